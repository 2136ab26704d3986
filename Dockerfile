# docker build --tag fedtap .                                     on the CPU
# docker build --tag fedtap-gpu --build-arg TORCH=cu126 .         on an NVIDIA GPU; run it with --gpus all
# docker run --rm --volume "$PWD/runs:/work/runs" fedtap run first_leak --victims 3
FROM python:3.11-slim

# PyTorch's folder of builds: cpu, or a version of CUDA.
ARG TORCH=cpu
# Extras of fedtap, such as [text] or [text,diffusion].
ARG EXTRAS=

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

RUN pip install --index-url "https://download.pytorch.org/whl/${TORCH}" 'torch>=2.6,<2.14' 'torchvision>=0.21,<0.29'

COPY pyproject.toml README.md LICENSE MANIFEST.in /source/
COPY fedtap /source/fedtap
COPY simulator /source/simulator
COPY attackers /source/attackers
COPY clients /source/clients
COPY scenarios /source/scenarios
RUN pip install "/source${EXTRAS}" && rm -r /source

RUN useradd --create-home fedtap && mkdir --parents /work/runs /work/data && chown --recursive fedtap /work
USER fedtap
WORKDIR /work
ENTRYPOINT ["fedtap"]
CMD ["--help"]
