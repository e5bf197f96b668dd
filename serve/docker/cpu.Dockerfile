# clipress with the extra index, on a CPU. In a checkout:
#   docker build -f serve/docker/cpu.Dockerfile -t clipress-serve .
#   docker run --rm -v "$PWD/runs:/runs" clipress-serve predict /runs/demo /runs/cat.jpg --labels cat,dog
FROM python:3.12.1-slim-bookworm
COPY . /opt/clipress
RUN pip install --no-cache-dir --constraint /opt/clipress/constraints.txt '/opt/clipress[index]'
USER nobody
ENTRYPOINT ["clipress"]
CMD ["--help"]
