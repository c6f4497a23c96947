# The GPU image: docker build -t megatron-zebra . && docker run --gpus all --ipc host -it megatron-zebra
#
# NOT BUILT where it was written: there was no container engine and no GPU there. Versions are pinned to those that the
# CPU tests ran with (constraints.txt); flash-attn is the version that the attention backends were written against.
# The last step fails the build if a package does not import or the CPU path does not train.

# torch 2.13.0's wheel is built for CUDA 13.0; what is compiled here has to be of the same major version.
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu22.04

ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1
# Ubuntu 22.04's own Python 3.11 is a release candidate; the PPA has the released one.
RUN apt-get update \
    && apt-get install -y --no-install-recommends software-properties-common \
    && add-apt-repository -y ppa:deadsnakes/ppa \
    && apt-get install -y --no-install-recommends \
        python3.11 python3.11-dev python3.11-venv build-essential git libibverbs1 librdmacm1 ibverbs-providers \
    && rm -rf /var/lib/apt/lists/*
RUN python3.11 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /workspace/megatron-zebra
COPY constraints.txt ./

# torch first: DeepSpeed and flash-attn look at it while they are built.
ARG TORCH_INDEX=
RUN pip install -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch \
    && python -c "import torch; assert torch.version.cuda and torch.version.cuda.startswith('13.'), torch.version.cuda"

# Compiled here, for Ampere, Ada (as 80) and Hopper; each job needs about 4 GiB of memory.
ARG MAX_JOBS=4
ARG FLASH_ATTN_CUDA_ARCHS="80;90"
RUN pip install -c constraints.txt packaging ninja wheel setuptools psutil einops \
    && MAX_JOBS=$MAX_JOBS FLASH_ATTN_CUDA_ARCHS=$FLASH_ATTN_CUDA_ARCHS FLASH_ATTENTION_FORCE_BUILD=TRUE \
        pip install -c constraints.txt --no-build-isolation --no-deps flash-attn==2.8.3.post2

COPY . .
RUN DS_BUILD_OPS=0 pip install -c constraints.txt -e ".[gpu]"

# Smoke test, without a GPU (a build has none): the packages import, and a few steps train on the CPU.
RUN python -c "import deepspeed, torch, flash_attn, liger_kernel, megatron_zebra; print(torch.__version__, flash_attn.__version__)" \
    && python pretrain_zebra.py --config launch/recipes/debug.yaml --dry-run --world-size 8 \
    && torchrun --standalone --nproc-per-node 2 pretrain_zebra.py --config launch/recipes/debug.yaml \
        --parallel.device cpu --training.steps 2 --logging.run_dir /tmp/smoke \
    && rm -r /tmp/smoke

CMD ["bash"]
