"""
OpenRLHF with the scores of a student behind `trl-dpg serve`. Copy this file; it needs what OpenRLHF ships.

    trl-dpg serve --config recipe.yaml
    DPG_SIZE=1024 python3 -m openrlhf.cli.train_ppo_ray --remote_rm_url openrlhf_reward.py ...

DPG_SIZE is the number of completions of a step: `rollout_batch_size` times `n_samples_per_prompt`. The server waits
until it has all of them, so all must be asked for at once. Set OPENRLHF_ASYNC_NUM_TASKS to at least DPG_SIZE. Versions
that call the function in chunks, as Ray tasks, need a CPU for each chunk: set `micro_rollout_batch_size` accordingly.
Newer versions call these arguments `--reward.remote_url`, `--rollout.batch_size`, `--rollout.n_samples_per_prompt`.
Train without evaluation (`eval_steps`) and without `dynamic_filtering`: they would call this function as well.
"""

import asyncio
import json
import os
import time
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor

import torch


SERVER = os.environ.get("DPG_SERVER", "http://127.0.0.1:8000")
SIZE = int(os.environ["DPG_SIZE"])
STREAM = os.environ.get("DPG_STREAM", "openrlhf")  # runs that share a server need names of their own
TOKEN = os.environ.get("TRL_DPG_SERVER_TOKEN")
MAX_WAIT = 3600  # seconds for a server that does not answer
ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "</s>", "<pad>")  # not part of the text

try:  # each sample waits in a thread, of which asyncio has few by default
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(SIZE))
except RuntimeError:
    pass  # not loaded by an asynchronous actor


def reward_func(queries, prompts, labels, **kwargs):
    """The rewards of some completions of a step, or of all. A query is a prompt with its completion."""
    answer = ask([completion(query, prompt) for query, prompt in zip(queries, prompts, strict=True)])
    rewards = torch.tensor(answer["rewards"])
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"dpg_score": torch.tensor(answer["scores"])}}


def completion(query, prompt):
    """What the generator wrote, without the tokens that end it."""
    place = query.find(prompt)
    if place >= 0:
        text = query[place + len(prompt) :]
    else:  # a prompt that was too long is cut off on the left
        begin = next((k for k in range(len(prompt)) if query.startswith(prompt[k:])), len(prompt))
        if begin == len(prompt):
            raise ValueError(f"The query does not have its prompt in it: {query!r:.200}")
        text = query[len(prompt) - begin :]
    while text.rstrip().endswith(ENDS):
        for end in ENDS:
            text = text.rstrip().removesuffix(end)
    return text


def ask(texts):
    """The server's answer, once it has all texts of the step. The rewards' standard deviation over the step is 1."""
    samples = [{"id": uuid.uuid4().hex, "text": text} for text in texts]
    content = json.dumps({"stream": STREAM, "size": SIZE, "samples": samples}).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {TOKEN}"} if TOKEN else {})
    last_answer = time.monotonic()
    while time.monotonic() - last_answer < MAX_WAIT:  # the same request again: no sample counts twice
        try:
            request = urllib.request.Request(f"{SERVER}/score", content, headers)
            with urllib.request.urlopen(request, timeout=120) as response:
                if response.status == 200:
                    return json.load(response)
            last_answer = time.monotonic()  # 202: not all samples are there, or they are being scored
            continue
        except urllib.error.HTTPError as error:
            if error.code not in (502, 503, 504):  # no room, or no server behind a proxy
                raise RuntimeError(f"The score server answers {error.code}: {error.read().decode()}") from None
        except OSError:
            pass  # it is away, and perhaps being started again
        time.sleep(2)
    raise RuntimeError(f"The score server at {SERVER} did not answer for {MAX_WAIT} s.")
