# Sourced by toy.sh and run.sh, from the repository's folder: `. tests/environment.sh FILE` makes the virtual
# environment .venv, installs FILE's packages into it and activates it. An environment that is active is left
# alone; to install into it: USE_ACTIVE=1 bash tests/toy.sh
if [ "${USE_ACTIVE:-0}" != 1 ]; then
  if [ ! -x .venv/bin/pip ]; then
    echo "making the virtual environment .venv"
    if ! python3 -m venv .venv > /dev/null; then
      rm -rf .venv
      echo "error: python3 cannot make a virtual environment: on Debian or Ubuntu run" \
           "'apt install python3-venv' first" >&2
      exit 2
    fi
  fi
  . .venv/bin/activate
fi
python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: Python 3.11 or later is needed; python3 here is $(python -V)" >&2
  exit 2
}
environment=$(python -c 'import sys; print(sys.prefix)')
if ! cmp -s "$1" "$environment/nanodrdo-$(basename "$(dirname "$1")").txt"; then
  echo "installing the packages of $1 into $environment (1.6 GB with the CPU build of torch)"
  python -m pip install --disable-pip-version-check -r "$1"
  cp "$1" "$environment/nanodrdo-$(basename "$(dirname "$1")").txt"
fi
echo "the environment is $environment; to use it yourself: . $environment/bin/activate"
