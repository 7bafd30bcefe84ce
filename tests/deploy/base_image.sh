#!/usr/bin/env bash
# The image that the Dockerfile starts from, made of Debian packages and the Python that runs the tests: for machines
# that reach no image registry. What pip was told in PIP_CERT and PIP_FIND_LINKS, it is told in the image.
set -euo pipefail
python=${1:?the Python to put into the image}
image=${2:?the name of the image}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

prefix=$("$python" -c 'import sys; print(sys.base_prefix)')
name=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
mmdebstrap --quiet --variant=minbase \
    --include=ca-certificates,libssl3,libffi8,libsqlite3-0,libbz2-1.0,liblzma5,libreadline8,libexpat1,zlib1g,libncursesw6 \
    bookworm "$scratch/debian.tar"
podman import --quiet "$scratch/debian.tar" "localhost/debian-for-$name" > /dev/null

mkdir -p "$scratch/context/local/bin" "$scratch/context/local/lib" "$scratch/context/wheels" "$scratch/context/certificates"
cp "$prefix/bin/$name" "$scratch/context/local/bin/"
ln -s "$name" "$scratch/context/local/bin/python3"
tar -C "$prefix" --exclude=site-packages --exclude=test --exclude=__pycache__ -c "lib/$name" include | tar -C "$scratch/context/local" -x
find "$prefix/lib" -maxdepth 1 -name 'libpython*' -exec cp -P {} "$scratch/context/local/lib/" \;
{
    echo "FROM localhost/debian-for-$name"
    echo 'COPY local /usr/local'
    echo 'RUN ldconfig'
    if [ -n "${PIP_CERT:-}" ]; then
        cp "$PIP_CERT" "$scratch/context/certificates/ca.crt"
        echo 'COPY certificates/ca.crt /etc/ssl/certs/ca-certificates.crt'
        echo 'ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt'
    fi
    if [ -d "${PIP_FIND_LINKS:-}" ]; then
        cp -r "$PIP_FIND_LINKS"/. "$scratch/context/wheels/"
        echo 'COPY wheels /wheels'
        echo 'ENV PIP_FIND_LINKS=/wheels'
    fi
} > "$scratch/context/Dockerfile"
podman build --quiet --format docker --tag "$image" "$scratch/context"
