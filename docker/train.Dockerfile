# Every command, on an NVIDIA GPU where `docker run` gives one:
#   docker build -f docker/train.Dockerfile -t mvke-train .
#   docker run --gpus all -v "$PWD:/work" mvke-train train --data log.toml --run_name mine
FROM python:3.11-slim

COPY requirements.lock pyproject.toml README.md LICENSE /src/
COPY mvke_tf /src/mvke_tf
RUN sed -E '/^ /d; s/ *\\$//' /src/requirements.lock > /src/constraints.txt \
    && pip install --no-cache-dir --constraint /src/constraints.txt '/src[analysis,compare,datasets,gpu,profile,train,tune]' \
    && rm -rf /src \
    && useradd --create-home mvke
USER mvke
WORKDIR /work
ENTRYPOINT ["mvke"]
CMD ["--help"]
