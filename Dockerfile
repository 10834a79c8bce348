# nanochat in a container; docs/getting-started.md says how it is built and run.
FROM python:3.12-slim

# What runs on: cpu, or cu130 for NVIDIA GPUs. One of PyTorch's indices, https://download.pytorch.org/whl/DEVICE.
ARG DEVICE=cpu

# g++ compiles the kernels of torch.compile; bubblewrap and libseccomp keep a model's programs apart.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bubblewrap g++ libseccomp2 \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 nanochat && install -d -o nanochat -g nanochat /data
WORKDIR /app
# PyTorch first: these gigabytes stay in the cache while the code changes.
COPY pyproject.toml ./
# hadolint ignore=DL3013
RUN torch=$(sed -n 's/^    "\(torch==[0-9.]*\)",$/\1/p' pyproject.toml) \
    && python -m venv .venv \
    && .venv/bin/pip install --no-cache-dir "$torch" --index-url "https://download.pytorch.org/whl/$DEVICE"
COPY . .
# The last line tells runs/setup.sh, which the recipes call, that all is installed.
RUN .venv/bin/pip install --no-cache-dir --editable . \
    && printf '%s' "cpu,gpu $(cksum <pyproject.toml)" >.venv/.nanochat-installed

USER 1000
ENV PATH=/app/.venv/bin:$PATH NANOCHAT_BASE_DIR=/data PYTHONUNBUFFERED=1
VOLUME /data
EXPOSE 8000
HEALTHCHECK --start-period=2m CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
# Serves the newest fine-tuned model of the volume; other commands can stand in its place (docs/getting-started.md).
# Behind a port of the machine it runs on, without a key, it answers to that machine's names alone.
CMD ["python", "-m", "scripts.chat_web", "--host", "0.0.0.0", "--allow-host", "127.0.0.1", "--allow-host", "localhost", \
     "--allow-host", "[::1]", "--allow-host", "host.docker.internal"]
