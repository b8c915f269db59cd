"""
verl with the scores of a student behind `trl-dpg serve`. Copy this file; it needs the standard library only.

    trl-dpg serve --config recipe.yaml
    DPG_SIZE=1024 python -m verl.trainer.main_ppo ... \
        custom_reward_function.path=verl_reward.py custom_reward_function.name=compute_score

DPG_SIZE is the number of completions of a step: `data.train_batch_size` times `actor_rollout_ref.rollout.n`. The
server waits until it has all of them, so all must be asked for at once. verl's reward loop does so with
`compute_score`, which is asynchronous. The reward manager `batch` needs `custom_reward_function.name=compute_scores`.
verl's older `naive` manager asks for one sample after the other and cannot be used.
"""

import asyncio
import json
import os
import time
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor


SERVER = os.environ.get("DPG_SERVER", "http://127.0.0.1:8000")
SIZE = int(os.environ["DPG_SIZE"])
STREAM = os.environ.get("DPG_STREAM", "verl")  # runs that share a server need names of their own
TOKEN = os.environ.get("TRL_DPG_SERVER_TOKEN")
MAX_WAIT = 3600  # seconds for a server that does not answer
VALIDATION = ("val", "test", "validation")  # `extra_info["split"]` of rows that are not trained on

_threads = ThreadPoolExecutor(SIZE)  # each sample waits in one


async def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    """The reward of one completion."""
    if _is_validation(extra_info):
        return 0.0
    (reward,) = await asyncio.get_running_loop().run_in_executor(_threads, rewards, [solution_str])
    return reward


def compute_scores(data_sources, solution_strs, ground_truths, extra_infos, **kwargs):
    """The rewards of some completions of a step, or of all."""
    trained = [place for place, info in enumerate(extra_infos) if not _is_validation(info)]
    found = rewards([solution_strs[place] for place in trained]) if trained else []
    by_place = dict(zip(trained, found, strict=True))
    return [by_place.get(place, 0.0) for place in range(len(solution_strs))]


def _is_validation(extra_info):
    return (extra_info or {}).get("split") in VALIDATION


def rewards(texts):
    """The rewards of texts, once the server has all texts of the step. Their standard deviation over the step is 1."""
    samples = [{"id": uuid.uuid4().hex, "text": text} for text in texts]
    content = json.dumps({"stream": STREAM, "size": SIZE, "samples": samples}).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {TOKEN}"} if TOKEN else {})
    last_answer = time.monotonic()
    while time.monotonic() - last_answer < MAX_WAIT:  # the same request again: no sample counts twice
        try:
            request = urllib.request.Request(f"{SERVER}/score", content, headers)
            with urllib.request.urlopen(request, timeout=120) as response:
                if response.status == 200:
                    return json.load(response)["rewards"]
            last_answer = time.monotonic()  # 202: not all samples are there, or they are being scored
            continue
        except urllib.error.HTTPError as error:
            if error.code not in (502, 503, 504):  # no room, or no server behind a proxy
                raise RuntimeError(f"The score server answers {error.code}: {error.read().decode()}") from None
        except OSError:
            pass  # it is away, and perhaps being started again
        time.sleep(2)
    raise RuntimeError(f"The score server at {SERVER} did not answer for {MAX_WAIT} s.")
