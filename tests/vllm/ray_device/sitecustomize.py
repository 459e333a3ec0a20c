"""Tell Ray what vLLM's processors are called, in every process that finds this folder on its path.

vLLM lets Ray place its workers by GPUs, and refuses it on processors. Here Ray is told of as many GPUs as workers.
"""

import sys
from importlib.machinery import PathFinder


class _Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "vllm.platforms.cpu":
            return None
        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def execute_and_tell(module):
            execute(module)
            module.CpuPlatform.ray_device_key = "GPU"

        spec.loader.exec_module = execute_and_tell
        return spec


sys.meta_path.insert(0, _Finder())
