"""Let vLLM use Ray on a CPU, in every process that has this folder on its path.

vLLM has Ray place workers by device, and refuses Ray on a CPU. Here CPU workers claim the GPUs that Ray is given.
"""

import sys
from importlib.machinery import PathFinder


class _Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "vllm.platforms.cpu":
            return None
        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def execute_and_patch(module):
            execute(module)
            module.CpuPlatform.ray_device_key = "GPU"

        spec.loader.exec_module = execute_and_patch
        return spec


sys.meta_path.insert(0, _Finder())
