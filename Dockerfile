# The README's install steps, nothing more; no weights inside.
#   CPU:   docker build -t rae .
#   CUDA:  docker build -t rae --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
FROM python:3.11-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /rae
COPY . .
RUN python3.11 -m venv .venv
RUN .venv/bin/pip install --no-cache-dir --extra-index-url $TORCH_INDEX .
RUN useradd --create-home rae && mkdir /workspace && chown rae /workspace
USER rae
ENV PATH=/rae/.venv/bin:$PATH RAE_WORKSPACE=/workspace
ENTRYPOINT ["rae"]
CMD ["--help"]
