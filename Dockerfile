# Stairs on CUDA: vLLM's own image and this plugin beside it. Nothing in the image is replaced.
#
#   docker build -t vllm-stairs .
#   docker run --gpus all -p 8000:8000 vllm-stairs TARGET \
#       --speculative-method stairs --speculative-model DRAFT
#
# Not built by this project's tests, which have no container runtime and no GPU.
ARG VLLM_VERSION=0.32.0
FROM vllm/vllm-openai:v${VLLM_VERSION}

COPY . /src/vllm-stairs
# --no-deps: torch, vllm and transformers are the image's. Ray is added only where it is missing or too old.
RUN pip install --no-cache-dir --no-deps /src/vllm-stairs \
    && pip install --no-cache-dir 'ray>=2.52' \
    && rm -rf /src/vllm-stairs

# vLLM's image already has ENTRYPOINT ["vllm", "serve"].
