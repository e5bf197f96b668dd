# Triton with clipress for its models in Python, for engines on a GPU. In a checkout:
#   docker build -f serve/docker/gpu.Dockerfile -t clipress-triton:24.10 .
# A repository's README.md has the `docker run` line. This release's python backend answers with empty tensors, and no error,
# under NumPy 2, so NumPy alone has another version than the tested one.
FROM nvcr.io/nvidia/tritonserver:24.10-py3
COPY . /opt/clipress
RUN grep -v '^numpy==' /opt/clipress/constraints.txt > /tmp/constraints.txt \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt numpy==1.26.4 '/opt/clipress[index]' \
    && rm /tmp/constraints.txt
