# mochi-tune for NVIDIA GPUs. The torch wheels include CUDA and cuDNN; the host needs the driver and the NVIDIA
# Container Toolkit. Build: docker build -t mochi-tune .
FROM python:3.12-slim-bookworm

# gcc for Triton and torch.compile; tini, which forwards SIGTERM, so that a stopped container saves its step; libgl1 and
# libglib2.0-0 for OpenCV, which split uses.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev tini libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

# Install the pinned torch first: this layer is rebuilt only when the constraints change.
WORKDIR /opt/mochi-tune
COPY constraints.txt ./
RUN pip install --constraint constraints.txt torch==2.13.0
COPY pyproject.toml README.md LICENSE ./
COPY mochi_tune mochi_tune
COPY recipes recipes
COPY data_prep data_prep
COPY conf conf
RUN pip install --constraint constraints.txt '.[ui,footage,bitsandbytes]'

# This user owns the files on the volumes: build with your own id, --build-arg UID=$(id -u).
ARG UID=1000
RUN useradd --create-home --uid "${UID}" mochi \
    && mkdir -p /project/conf /project/videos /project/cache /project/runs /project/.mochi_tune \
        /home/mochi/.cache/mochi_tune/mochi-1-preview /home/mochi/.cache/mochi_tune/compiled \
    && chown -R mochi /project /home/mochi
USER mochi
WORKDIR /project
VOLUME ["/project/videos", "/project/cache", "/project/runs", "/project/.mochi_tune", \
    "/home/mochi/.cache/mochi_tune/mochi-1-preview", "/home/mochi/.cache/mochi_tune/compiled"]
EXPOSE 7860
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "-g", "--", "mochi-tune"]
CMD ["--help"]
