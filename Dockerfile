# Serves on the CPU; with a torch build that has CUDA and `docker run --gpus all` on NVIDIA GPUs too.
FROM python:3.11-slim

# The native CPU kernels are compiled at the first start; without a compiler the server runs on plain torch.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*

# pip reads this variable: --build-arg PIP_EXTRA_INDEX_URL=<torch's index of CPU builds> keeps CUDA's gigabytes out.
ARG PIP_EXTRA_INDEX_URL
WORKDIR /app
COPY requirements/serve.txt requirements/serve.txt
RUN pip install --no-cache-dir -r requirements/serve.txt

COPY pyproject.toml README.md LICENSE ./
COPY lora_serve lora_serve
RUN pip install --no-cache-dir --no-deps .

RUN useradd --create-home --uid 1000 serve && mkdir /data && chown serve:serve /data
USER serve
ENV XDG_DATA_HOME=/data \
    HF_HOME=/data/huggingface \
    LORA_SERVE_HOST=0.0.0.0 \
    LORA_SERVE_PORT=8000
VOLUME /data
EXPOSE 8000

HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['LORA_SERVE_PORT'] + '/health', timeout=4)"]

# A public bind needs keys: mount a key file and give --api-key-file, or say --insecure.
ENTRYPOINT ["lora-serve", "serve"]
CMD ["--help"]
