# docker build --tag fedtap --build-arg TORCH_INDEX=URL .         URL: PyTorch's index of builds for the CPU, or for your CUDA,
#                                                                 as its install page names it; left out, pip's own index
# docker run --rm --volume "$PWD/runs:/work/runs" fedtap run first_leak --victims 3
FROM python:3.11-slim

# PyTorch's index of builds; on Linux pip's own has builds for CUDA, which take gigabytes and run with --gpus all.
ARG TORCH_INDEX=
# Extras of fedtap, such as [text] or [text,diffusion].
ARG EXTRAS=

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} 'torch>=2.6,<2.14' 'torchvision>=0.21,<0.29'

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
