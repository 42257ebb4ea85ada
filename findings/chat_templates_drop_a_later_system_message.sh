#!/usr/bin/env bash
# One would have sworn that a chat template writes every message that it is given, or raises on a role that
# it does not take at that place. Of the originals in trl 1.16.0's wheel, rendered by transformers 5.23.0,
# gpt-oss's and Qwen3-VL's take a system message at the start alone: a later one leaves no trace and no
# error, while 29 others render it and the rest raise or take no plain text. Preference data in which a rule
# is added in mid-conversation ("from now on answer in French") then asks the model for an answer to a rule
# that it can not see. Look for the text of every message in what was rendered.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check transformers==5.23.0 jinja2==3.1.6
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check --no-deps trl==1.16.0
cd "$dir"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
"$dir/venv/bin/python" - <<'PY'
import pathlib
import sys

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>")), bos_token="<eos>",
    eos_token="<eos>")
messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."},
            {"role": "system", "content": "Answer in French."}, {"role": "user", "content": "How are you?"},
            {"role": "assistant", "content": "Bien."}]
site = next(path for path in sys.path if path.endswith("site-packages"))
fate = {}
for template in sorted(pathlib.Path(site, "trl", "chat_templates").glob("*.jinja")):
    name = template.stem
    if name.endswith("_training"):
        continue
    tokenizer.chat_template = template.read_text()
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError:
        fate[name] = "raises"
        continue
    if "How are you?" not in text:
        fate[name] = "takes no plain text"
    else:
        fate[name] = "renders it" if "Answer in French." in text else "drops it"
for kind in sorted(set(fate.values())):
    names = [name for name in fate if fate[name] == kind]
    print(f"{kind}: {len(names)}: {', '.join(names)}")
assert [name for name in fate if fate[name] == "drops it"] == ["gptoss", "qwen3_vl"]
PY
