# vLLM's own image plus this package; use it as vllm/vllm-openai. No build of it was tried.
#   docker build -t pacellm-vllm .
#   docker run --gpus all -p 8000:8000 -e VLLM_PLUGINS=pacellm,pacellm_http \
#       pacellm-vllm Qwen/Qwen2.5-7B-Instruct \
#       --hf-overrides '{"architectures": ["PaceQwen2ForCausalLM"]}' \
#       --additional-config '{"pacellm": {"layers": [12, 26]}}'
# Without VLLM_PLUGINS memory works, and has no page, counts or metrics (docs/operating.md).
ARG VLLM=0.33.0
FROM vllm/vllm-openai:v${VLLM}
COPY pyproject.toml README.md LICENSE /opt/pacellm-vllm/
COPY pacellm_vllm /opt/pacellm-vllm/pacellm_vllm
# What the image has stays as it is, and what is missing (scikit-learn, which vLLM does not need) is
# added; if the two do not go together, the build fails.
RUN python3 -m pip list --format freeze > /tmp/in-the-image.txt \
    && python3 -m pip install --no-cache-dir -c /tmp/in-the-image.txt /opt/pacellm-vllm
