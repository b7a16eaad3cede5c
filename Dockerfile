# lmrl on a CPU:  docker build -t lmrl . && docker run --rm -v "$PWD:/work" lmrl train random_walks/ppo --output runs/ppo
FROM python:3.11-slim

# The CPU build of torch is much smaller than the CUDA build that a plain install brings.
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu

# Further parts, for instance --build-arg EXTRAS=[rewards,vader]
ARG EXTRAS=""
COPY . /opt/lmrl
RUN pip install --no-cache-dir -e "/opt/lmrl${EXTRAS}"

# Recipes, data and runs are where the container is started.
WORKDIR /work
ENTRYPOINT ["lmrl"]
CMD ["--help"]
