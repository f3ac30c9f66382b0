"""Loads what `push_worker.py` pushed, in a process without the package; started as `clean_process_worker.py` is.

python -I -S load_worker.py job.json     job: {"site_packages": [...], "output": file, "saved": folder}
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from clean_process_worker import compute, forget_package  # noqa: E402

AUTO_CLASSES = {
    "loopback/causal": "AutoModelForCausalLM",
    "loopback/body": "AutoModel",
    "loopback/sequence": "AutoModelForSequenceClassification",
    "loopback/token": "AutoModelForTokenClassification",
    "loopback/question": "AutoModelForQuestionAnswering",
}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    forget_package(job["site_packages"])
    import torch
    import transformers

    torch.set_num_threads(1)
    loaded: dict = {"outputs": {}, "saved": {}, "modules": []}
    for repository, name in AUTO_CLASSES.items():
        auto_class = getattr(transformers, name)
        model = auto_class.from_pretrained(repository, trust_remote_code=True)
        loaded["outputs"][repository] = compute(model)
        loaded["modules"].append(type(model).__module__)
        # What remote code saves has to be as complete as what it was loaded from, and so has what that saves.
        for generation in ("first", "second"):
            folder = f"{job['saved']}/{generation}/{name}"
            model.save_pretrained(folder)
            model = auto_class.from_pretrained(folder, trust_remote_code=True)
            loaded["saved"][folder] = compute(model)
    loaded["config"] = f"{job['saved']}/config"
    transformers.AutoConfig.from_pretrained("loopback/causal", trust_remote_code=True).save_pretrained(loaded["config"])
    loaded["tokens"] = transformers.AutoTokenizer.from_pretrained("loopback/causal")("the lazy dog")["input_ids"]
    generate = transformers.pipeline("text-generation", model="loopback/causal", trust_remote_code=True)
    continued = generate("the quick", max_new_tokens=8, do_sample=False, return_tensors=True)
    loaded["continued"] = list(continued[0]["generated_token_ids"])
    torch.save(loaded, job["output"])


if __name__ == "__main__":
    main()
