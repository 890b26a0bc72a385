# The images: `predict` finds nuclei, and serves that, `train` and `train-gpu` do everything.
#
#   docker build --tag nucleus:predict --build-arg EXTRA=predict .
#   docker build --tag nucleus:train .
#   docker build --tag nucleus:train-gpu --build-arg EXTRA=train-gpu .
#
# EXTRA names the lock file in requirements/ that is installed, with the hash of every package. BASE may name a mirror.

ARG BASE=python:3.11.16-slim-bookworm@sha256:528257d48c1da0dcecc2e725d1ae34498d60c965f1241e39cd6a85a8859bdf84
ARG EXTRA=train

FROM ${BASE} AS packages
ARG EXTRA
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /build

RUN apt-get update \
    && apt-get install --yes --no-install-recommends "binutils=2.40*" \
    && rm -rf /var/lib/apt/lists/*

# uv, with the version and hashes of the lock file, installs in seconds what takes pip minutes, and builds nucleus.
COPY requirements/dev.txt requirements/${EXTRA}.txt requirements/
RUN sed --quiet '/^uv==/,/[^\]$/p' requirements/dev.txt \
    | python -m pip install --no-cache-dir --disable-pip-version-check --require-hashes --requirement /dev/stdin

# Bytecode is compiled here, because the folder is read-only at run time.
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never
COPY infra/image/slim.py ./
RUN --mount=type=cache,target=/var/cache/uv \
    uv venv --python python3.11 /opt/nucleus \
    && uv pip install --cache-dir /var/cache/uv --python /opt/nucleus/bin/python \
       --require-hashes --no-deps --requirement "requirements/${EXTRA}.txt" \
    && python slim.py "${EXTRA}" /opt/nucleus/lib/python3.11/site-packages


# The program itself, in a folder of its own, so that a change of the code makes a small layer.
FROM packages AS program
ARG EXTRA
COPY pyproject.toml README.md LICENSE ./
COPY job/ job/
COPY nucleus/ nucleus/
RUN uv build --quiet --wheel --out-dir dist . \
    && uv pip install --no-cache --python /opt/nucleus/bin/python --no-deps dist/*.whl
WORKDIR /opt/nucleus
RUN mkdir /program \
    && cp --archive --parents bin/nucleus lib/python3.11/site-packages/job lib/python3.11/site-packages/nucleus* /program


FROM ${BASE} AS image-train
# tini reaps orphaned processes of Ray and forwards signals; KubeRay's probes call wget; Ray's cluster launcher calls
# rsync in the container and, on the head, ssh to start the other machines.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
       "openssh-client=1:9.2*" "rsync=3.*" "tini=0.19.*" "wget=1.21.*" \
    && rm -rf /var/cache/apt/* /var/lib/apt/lists/*

# 1000 is the first user on most machines, so that it can read the files that Ray's cluster launcher mounts.
# Login shells, which the launcher uses, reset PATH.
RUN useradd --create-home --uid 1000 --user-group --shell /bin/bash nucleus \
    && install --directory --owner=1000 --group=1000 /home/nucleus/.cache /home/nucleus/work \
    && echo "export PATH=/opt/nucleus/bin:\$PATH" > /etc/profile.d/nucleus.sh

COPY --from=packages /opt/nucleus /opt/nucleus
COPY --from=program /program /opt/nucleus
ENV HOME=/home/nucleus \
    MPLCONFIGDIR=/tmp/matplotlib \
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

FROM image-train AS image-train-gpu


# The predict image is the base without what only package managers and logins need; bash and coreutils stay, for workflow
# engines start a shell in the image, and so does the list of Debian's packages, for scanners read it. Packages whose
# removal runs a script go before the interpreters of these scripts.
FROM ${BASE} AS root-predict
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
COPY infra/image/predict-packages.txt /tmp/
RUN useradd --create-home --uid 1000 --user-group --shell /bin/bash nucleus \
    && install --directory --owner=1000 --group=1000 --mode=1777 /work \
    && scripts="perl-base debconf init-system-helpers" \
    && dpkg-query --show --showformat '${Package}\n' | grep -vxF --file=/tmp/predict-packages.txt > /tmp/unneeded \
    && grep -vxF "${scripts// /$'\n'}" /tmp/unneeded | xargs dpkg --purge --force-all \
    && xargs dpkg --purge --force-all <<< "${scripts}" \
    && rm -rf "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"/{ensurepip,idlelib,lib2to3,pydoc_data,tkinter,turtledemo} \
       /usr/local/lib/python3.11/*-packages/* /usr/local/include /usr/local/bin/{2to3,idle,pip,pydoc}* \
       /usr/lib/x86_64-linux-gnu/gconv /usr/share/{doc,man,info} /var/lib/apt /var/cache/* /var/log/* /tmp/*
# Bytecode only of what a command imports: that of everything is 90 MB.
COPY --from=program /opt/nucleus /opt/nucleus
RUN find / -xdev -name __pycache__ -prune -exec rm -rf {} + \
    && /opt/nucleus/bin/python -c 'import boto3, cv2, fastapi, imagecodecs, onnxruntime, rich.progress, scipy.ndimage, skimage.measure, skimage.segmentation, tifffile, uvicorn'

FROM scratch AS image-predict
# hadolint ignore=DL3067
COPY --from=root-predict / /
ENV HOME=/home/nucleus \
    LANG=C.UTF-8 \
    PATH=/opt/nucleus/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["nucleus"]
CMD ["--help"]


# hadolint ignore=DL3006
FROM image-${EXTRA}
ARG EXTRA
ARG REVISION=""
LABEL org.opencontainers.image.title="nucleus" \
      org.opencontainers.image.description="Finds cell nuclei in microscope images: training on Ray, and the command line" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11.16-slim-bookworm" \
      nucleus.extra="${EXTRA}"
ENV WANDB_GIT_COMMIT=${REVISION}
