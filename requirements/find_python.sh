#!/bin/sh
# Print the path of a Python that runs, of the first of these versions that is there: on PATH, in pyenv's folder, or
# installed by uv. The path is never in an environment, which could not be made anew by its own Python.
pyenv="${PYENV_ROOT:-$HOME/.pyenv}/versions"
uv="${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}"
script="import sys; print(sys._base_executable); sys.exit('%d.%d' % sys.version_info[:2] != sys.argv[1])"
for version in "$@"; do
  for python in "python$version" "$pyenv/$version".*/bin/python "$uv/cpython-$version".*/bin/python3; do
    # A shim of pyenv is on PATH even where its version is not active; it fails.
    path="$("$python" -c "$script" "$version" 2>/dev/null)" && echo "$path" && exit
  done
done
echo "Expected a Python of $(echo "$*" | sed 's/ /, /g'); found: $(python3 --version 2>/dev/null || echo none)." \
  "Install one, or run: make install PYTHON=/path/to/python" >&2
exit 1
