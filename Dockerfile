# Training on NVIDIA GPUs: docker build -t retort . ; what is left out is in .dockerignore.
FROM python:3.12-slim
# Triton compiles a launcher for each kernel with the system's C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /retort
COPY pyproject.toml constraints.txt README.md ./
RUN pip install --no-cache-dir -c constraints.txt -e ".[gpu,hf,data]"
COPY . .
CMD ["python", "train_kd.py", "--help"]
