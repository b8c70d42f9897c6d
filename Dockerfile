# LoRA Studio with the CUDA build of torch; without a GPU the same image works on the CPU.
#   docker build -t lora-studio .
#   docker run --init --gpus all -p 7860:7860 -v lora-studio:/data lora-studio
FROM python:3.12-slim

RUN useradd --create-home --uid 1000 user && mkdir /data && chown user:user /data
USER user
ENV HOME=/home/user \
    PATH=/home/user/.local/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    GRADIO_SERVER_NAME=0.0.0.0 \
    GRADIO_SERVER_PORT=7860 \
    LORA_STUDIO_CONTAINER=1 \
    LORA_STUDIO_HOME=/data/studio \
    HF_HOME=/data/huggingface
WORKDIR /home/user/app

# torch alone is gigabytes and changes rarely, then what else is installed, then the code: a change of the code rebuilds the last layer only.
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
RUN pip install --user "$TORCH" --index-url "$TORCH_INDEX"
COPY --chown=user requirements.txt ./
RUN pip install --user -r requirements.txt
COPY --chown=user . ./

VOLUME /data
EXPOSE 7860
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/studio/health', timeout=4)"]
CMD ["python", "app.py"]
