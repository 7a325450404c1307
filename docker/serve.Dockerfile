# A server of one exported model:
#   docker build -f docker/serve.Dockerfile -t mvke-serve .
#   docker run -p 8501:8501 -v "$PWD/runs/mine/export:/model:ro" -v "$PWD/token:/token:ro" mvke-serve \
#       --token_file /token --allowed_hosts models.example.com
FROM python:3.11-slim

COPY requirements.lock pyproject.toml README.md LICENSE /src/
COPY mvke_tf /src/mvke_tf
# The versions of requirements.lock, and only what serving needs.
RUN sed -E '/^ /d; s/ *\\$//' /src/requirements.lock > /src/constraints.txt \
    && pip install --no-cache-dir --constraint /src/constraints.txt '/src[serve]' \
    && rm -rf /src \
    && useradd --create-home mvke
USER mvke
WORKDIR /home/mvke
EXPOSE 8501
ENTRYPOINT ["mvke", "serve", "/model", "--host", "0.0.0.0"]
