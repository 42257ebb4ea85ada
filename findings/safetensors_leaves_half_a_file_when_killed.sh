#!/usr/bin/env bash
# One would have sworn that save_file writes into the file that it names, as torch.save does, so that the next
# save overwrites what a killed process left. safetensors 0.8.0 writes .tmp and six random characters beside
# it, and renames that file when it is whole. Whoever is killed meanwhile (out of time, out of memory) leaves
# it: hidden, of up to the model's size, and no later save into the folder takes it away. `ls` does not show
# it, and an upload of the folder sends it along. Delete .tmp* before you save into a folder again.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cd "$dir"
mkdir model
cat > save.py <<'PY'
import sys

import numpy as np
from safetensors.numpy import save_file

save_file({"weight": np.ones((int(sys.argv[1]), 2**20), np.float32)}, "model/model.safetensors")
PY
"$dir/venv/bin/python" - <<'PY'
import os
import subprocess
import sys
import time

process = subprocess.Popen([sys.executable, "save.py", "256"])  # 1 GB
while not os.listdir("model") and process.poll() is None:
    time.sleep(0.001)
process.kill()
process.wait()
left = os.listdir("model")
subprocess.run([sys.executable, "save.py", "1"], check=True)
after = sorted(os.listdir("model"))
print(f"a killed save left {left}; after a second save, which ended, the folder holds {after}")
assert len(left) == 1 and left[0].startswith(".tmp") and after == [*left, "model.safetensors"]
PY
