#!/usr/bin/env bash
# One would have sworn that load_dataset("json") keeps a string a string: numbers and booleans in quotes
# stay as they are, and so do clock times. In datasets 5.2.0 a column whose texts all look like dates
# becomes timestamps: "2021-03-04" comes back as a datetime, str() of which has a time that nobody wrote,
# and "...T10:00:00Z" loses its zone. Short answers to questions about dates are such a column (chosen
# turns, rejected stays text); one answer in words, or one empty one, and all stay strings, so that two
# files of one data set differ in type. features=Features({"chosen": Value("string")}) comes too late: the
# type is string, the text "2021-03-04 00:00:00". Dataset.from_list(rows) keeps what was written.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check datasets==5.2.0
cd "$dir"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1
"$dir/venv/bin/python" - <<'PY'
import json

from datasets import Dataset, Features, Value, load_dataset

columns = {
    "dates": ["2021-03-04", "1999-12-31"], "with a time": ["2021-03-04 10:00:00", "1999-12-31 23:59:59"],
    "with a zone": ["2021-03-04T10:00:00Z", "1999-12-31T23:59:59Z"],
    "a date and a word": ["2021-03-04", "In May"], "a date and nothing": ["2021-03-04", ""],
    "clock times": ["10:00:00", "23:59:59"], "years": ["2021", "1999"], "numbers": ["1.5", "42"],
    "booleans": ["true", "false"]}
types = {}
for name, answers in columns.items():
    with open(f"{name}.jsonl", "w") as file:
        for answer in answers:
            print(json.dumps({"prompt": "When was it?", "chosen": answer, "rejected": "Never."}), file=file)
    data = load_dataset("json", data_files=f"{name}.jsonl", split="train", cache_dir="cache")
    types[name] = data.features["chosen"].dtype
    print(f"{name}: {answers} -> {types[name]}, {[str(x) for x in data['chosen']]}")
asked = load_dataset("json", data_files="dates.jsonl", split="train", cache_dir="cache", features=Features(
    {column: Value("string") for column in ("prompt", "chosen", "rejected")}))
listed = Dataset.from_list([json.loads(line) for line in open("dates.jsonl")])
print("dates, with features:", asked["chosen"][:], "by from_list:", listed["chosen"][:])
assert listed["chosen"][:] == columns["dates"]
assert asked["chosen"][:] == [f"{day} 00:00:00" for day in columns["dates"]]
turned = [name for name, dtype in types.items() if dtype != "string"]
assert turned == ["dates", "with a time", "with a zone"]
assert all(types[n].startswith("timestamp") for n in turned)
PY
