"""Runs code in a fresh process whose Hub is on the loopback address."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


HIDDEN = ("HF_", "TRANSFORMERS_", "DIFFUSERS_", "PYTHON", "XDG_", "http_proxy", "HTTP_PROXY")


def run_fresh(
    code: str, home: Path, endpoint: str | None = None, token: str | None = None, installed: bool = True
) -> Any:
    r"""
    Args:
        code (`str`): Python; what it leaves in `result` comes back. `torch` uses one thread.
        home (`Path`): Folder of the caches, which a later process may share.
        endpoint (`str`, *optional*): The Hub's address; without it the process is offline.
        token (`str`, *optional*): The stored token.
        installed (`bool`): Whether MMAR's package is there.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(HIDDEN)}
    env |= {"HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_HUB_OFFLINE": "1"} if endpoint is None else {"HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1"}
    env |= {} if token is None else {"HF_TOKEN": token}
    paths = [Path(__file__).parent] + ([Path(__file__).parents[2]] if installed else [])
    env["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    home.mkdir(parents=True, exist_ok=True)
    script, answer = home / "script.py", home / "answer.json"
    answer.unlink(missing_ok=True)
    script.write_text(
        f"import json, torch\ntorch.set_num_threads(1)\n{code}\nopen({str(answer)!r}, 'w').write(json.dumps(result))\n"
    )
    done = subprocess.run([sys.executable, str(script)], env=env, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(answer.read_text())
