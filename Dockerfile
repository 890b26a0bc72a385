# One image for the driver, the workers and the command line.
#
#   docker build --tag nucleus:cpu .
#   docker build --tag nucleus:gpu --build-arg EXTRA=gpu .
#
# EXTRA names the lock file in requirements/ that is installed, with the hash of every package.

FROM python:3.11.16-slim-bookworm@sha256:528257d48c1da0dcecc2e725d1ae34498d60c965f1241e39cd6a85a8859bdf84 AS build
ARG EXTRA=cpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /build

# uv, with the version and hashes of the lock file, installs in seconds what takes pip minutes.
COPY requirements/ requirements/
RUN sed --quiet '/^uv==/,/[^\\]$/p' requirements/dev.txt \
    | python -m pip install --no-cache-dir --disable-pip-version-check --require-hashes --requirement /dev/stdin

# Bytecode is compiled here, because the folder is read-only at run time. TensorFlow's C++ headers need a compiler.
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never
RUN --mount=type=cache,target=/var/cache/uv \
    uv venv --python python3.11 /opt/nucleus \
    && uv pip install --cache-dir /var/cache/uv --python /opt/nucleus/bin/python \
       --require-hashes --no-deps --requirement "requirements/${EXTRA}.txt" \
    && rm -r /opt/nucleus/lib/python3.11/site-packages/tensorflow/include

COPY pyproject.toml README.md LICENSE ./
COPY job/ job/
COPY nucleus/ nucleus/
RUN uv pip install --no-cache --python /opt/nucleus/bin/python --no-deps --no-build-isolation .


FROM python:3.11.16-slim-bookworm@sha256:528257d48c1da0dcecc2e725d1ae34498d60c965f1241e39cd6a85a8859bdf84
ARG EXTRA=cpu
ARG REVISION=""
LABEL org.opencontainers.image.title="nucleus" \
      org.opencontainers.image.description="Finds cell nuclei in microscope images: training on Ray, and the command line" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11.16-slim-bookworm" \
      nucleus.extra="${EXTRA}"

# tini reaps orphaned processes of Ray and forwards signals; KubeRay's probes call wget; Ray's cluster launcher calls
# rsync in the container and, on the head, ssh to start the other machines.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
       "openssh-client=1:9.2*" "rsync=3.*" "tini=0.19.*" "wget=1.21.*" \
    && rm -rf /var/lib/apt/lists/*

# 1000 is the first user on most machines, so that it can read the files that Ray's cluster launcher mounts.
# Login shells, which the launcher uses, reset PATH.
RUN useradd --create-home --uid 1000 --user-group --shell /bin/bash nucleus \
    && install --directory --owner=1000 --group=1000 /home/nucleus/.cache /home/nucleus/work \
    && echo "export PATH=/opt/nucleus/bin:\$PATH" > /etc/profile.d/nucleus.sh

COPY --from=build /opt/nucleus /opt/nucleus
ENV HOME=/home/nucleus \
    WANDB_GIT_COMMIT=${REVISION} \
    PATH=/opt/nucleus/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /home/nucleus/work

# A Ray node is healthy while its raylet runs; any other container while the command line answers.
HEALTHCHECK --interval=30s --timeout=20s --start-period=60s --retries=3 \
    CMD ["sh", "-c", "if grep -qsx raylet /proc/[0-9]*/comm; then wget -qO- --timeout=10 http://127.0.0.1:52365/api/local_raylet_healthz | grep -qx success; else nucleus --version; fi"]

# No entry point: KubeRay and Ray's cluster launcher start a shell in this image.
ENTRYPOINT ["tini", "--"]
CMD ["nucleus", "--help"]
