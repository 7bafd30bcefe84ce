# Serves on the CPU. With --build-arg DEVICE=cuda the image has torch's CUDA build, and serves on NVIDIA GPUs as well:
# docker run --gpus all.
FROM python:3.11-slim AS build
ARG DEVICE=cpu
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/lora-serve
ENV PATH=/opt/lora-serve/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# PyPI's torch has CUDA. Without the address of an index of builds that have none, PyPI's has to do.
ARG CPU_INDEX=
COPY requirements/serve.txt .
RUN [ "$DEVICE" = cuda ] || [ -z "$CPU_INDEX" ] \
 || pip install --no-deps --retries 1 --timeout 10 --index-url "$CPU_INDEX" "$(grep -E '^torch==' serve.txt)" \
 || echo "no torch at $CPU_INDEX"
RUN pip install -r serve.txt

# The CPU's kernels are compiled here, for every instruction set; the one that fits is chosen when the server starts.
WORKDIR /sources
COPY pyproject.toml setup.py README.md LICENSE ./
COPY lora_serve lora_serve
RUN pip install --no-deps .

FROM python:3.11-slim
ARG DEVICE=cpu
# Triton compiles a GPU kernel's launcher when it is first used.
RUN [ "$DEVICE" = cpu ] \
 || { apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; }
RUN useradd --create-home --uid 1000 serve && mkdir /data && chown serve:serve /data
COPY --from=build /opt/lora-serve /opt/lora-serve
COPY deploy/docker/health.py /opt/lora-serve/health.py
COPY demo/model /opt/demo/model
COPY adapters /opt/demo/adapters

# Nothing is written outside /data and /tmp, so the root file system may be read-only.
USER 1000:1000
ENV PATH=/opt/lora-serve/bin:$PATH \
    XDG_DATA_HOME=/data \
    XDG_CACHE_HOME=/data/cache \
    HF_HOME=/data/huggingface \
    TRITON_CACHE_DIR=/data/cache/triton \
    LORA_SERVE_HOST=0.0.0.0
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 CMD ["python3", "/opt/lora-serve/health.py"]

# SIGTERM drains for as long as --drain-timeout says, 30 s by default: give the container a few seconds more to stop.
STOPSIGNAL SIGTERM
ENTRYPOINT ["lora-serve"]
# The demo. A public bind needs keys: add --api-key-file /data/keys.yaml, or --insecure.
CMD ["serve", "/opt/demo/model", "--served-model-name", "demo", "--adapters", "/opt/demo/adapters"]
