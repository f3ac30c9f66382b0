"""Loads folders in a process of its own and keeps what they compute; `test_clean_process.py` starts it.

    python -I -S clean_process_worker.py job.json     without the package, not even a `.pth` file of an installation
    python clean_process_worker.py job.json           with it

job.json: `{"site_packages": [...] or null, "cases": {name: {"folder", "auto_class", "load"}}, "output"}`.
"""

import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path


class Refuse(MetaPathFinder):
    """Makes an installed package unfindable, whatever path it lies on."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "hf_llmkernel":
            raise ImportError(f"{fullname} is not installed in this process")
        return None


def forget_package(site_packages: list[str]) -> None:
    sys.meta_path.insert(0, Refuse())
    sys.path += site_packages  # plain entries: their `.pth` files do not run
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert "llm_kernel" not in CONFIG_MAPPING, "the family is registered although the package is not there"


def compute(model) -> list:
    """Every tensor of the model's output for two sequences, one padded on the left."""
    import torch

    input_ids = torch.arange(3, 21).view(2, 9)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :3] = 0
    with torch.no_grad():
        outputs = model.eval()(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return [tensor.clone() for tensor in outputs.to_tuple()]


def load(case: dict, trust_remote_code: bool):
    import transformers

    auto_class = getattr(transformers, case["auto_class"])
    if trust_remote_code:
        return auto_class.from_pretrained(case["folder"], trust_remote_code=True, **case["load"])
    return auto_class.from_pretrained(case["folder"], **case["load"])


def run(case: dict, trust_remote_code: bool) -> dict:
    model = load(case, trust_remote_code)
    return {
        "outputs": compute(model),
        "module": type(model).__module__.partition(".")[0],
        "devices": sorted({str(device) for device in getattr(model, "hf_device_map", {}).values()}),
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    if job["site_packages"] is not None:
        forget_package(job["site_packages"])
    else:
        import hf_llmkernel  # noqa: F401 registers the family
    import torch

    torch.set_num_threads(1)
    results = {}
    for name, case in job["cases"].items():
        try:
            results[name] = run(case, trust_remote_code=job["site_packages"] is not None)
        except Exception as error:  # one case's failure is that case's result
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    torch.save(results, job["output"])


if __name__ == "__main__":
    main()
