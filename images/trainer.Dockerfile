# The trainer's image. Build from the repository's root: docker build -f images/trainer.Dockerfile .
# The digest is a multi-architecture index; move both Dockerfiles together.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

# What only the build needs: uv, and the list of dependencies, whose one home is pyproject.toml.
FROM ${BASE_IMAGE} AS tools
# A certificate bundle of the building machine, for networks that need one.
ARG SSL_CERT_FILE
RUN python3 -m pip --version || (apt-get update && apt-get install -y --no-install-recommends python3-pip)
RUN python3 -m pip install --no-cache-dir ${SSL_CERT_FILE:+--cert $SSL_CERT_FILE} --target /tools "uv>=0.9,<1"
COPY pyproject.toml /
# The fixed time keeps the layers below cached when pyproject.toml changes elsewhere.
RUN python3 -c "import tomllib; project = tomllib.load(open('/pyproject.toml', 'rb'))['project']; \
print('\n'.join(project['dependencies'] + project['optional-dependencies']['trainer']))" > /requirements.txt \
 && grep '^torch==' /requirements.txt > /torch.txt \
 && touch --date=@0 /requirements.txt /torch.txt

FROM ${BASE_IMAGE}
ARG SSL_CERT_FILE
ARG UV_CACHE_DIR=/var/cache/uv
RUN groupadd --gid 65532 kubetune \
 && useradd --uid 65532 --gid 65532 --create-home --shell /usr/sbin/nologin kubetune \
 && rm -rf /usr/local/bin/pip* /usr/local/lib/python3*/ensurepip /usr/local/lib/python3*/site-packages/*
ENV PATH=/opt/kubetune/bin:$PATH PYTHONUNBUFFERED=1
# torch and its CUDA libraries (4.7 GB) are a layer of their own, below the other dependencies and the code.
COPY --from=tools /torch.txt /opt/torch.txt
RUN --mount=type=bind,from=tools,source=/tools,target=/tools --mount=type=cache,target=/var/cache/uv \
    /tools/bin/uv venv --no-managed-python --python "$(command -v python3)" /opt/kubetune \
 && /tools/bin/uv pip install --python /opt/kubetune --link-mode copy --compile-bytecode -r /opt/torch.txt
COPY --from=tools /requirements.txt /opt/requirements.txt
RUN --mount=type=bind,from=tools,source=/tools,target=/tools --mount=type=cache,target=/var/cache/uv \
    /tools/bin/uv pip install --python /opt/kubetune --link-mode copy --compile-bytecode -r /opt/requirements.txt \
 && echo /opt/kubetune/code > "$(echo /opt/kubetune/lib/python3*/site-packages)/kubetune.pth"
COPY trainer/kubetune_contract /opt/kubetune/code/kubetune_contract
COPY trainer/kubetune_trainer /opt/kubetune/code/kubetune_trainer
# The root filesystem is read-only when this runs, so bytecode is written now; a clone may be private to its owner.
RUN chmod -R a+rX /opt/kubetune/code \
 && python -m compileall -q /opt/kubetune/code \
 && printf '#!/opt/kubetune/bin/python\nimport sys\nfrom kubetune_trainer.cli import main\nsys.exit(main())\n' > /opt/kubetune/bin/tune \
 && chmod 755 /opt/kubetune/bin/tune
USER 65532:65532
ENTRYPOINT ["python", "-m", "kubetune_trainer"]
