"""Chapter 7's judge: a larger model behind Ollama's address on this machine gives points to answers."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from fastgpt import env
from fastgpt.finetuning.instructions import format_input
from fastgpt.finetuning.optional import require

_LOCAL = ("localhost", "127.0.0.1", "::1")

# The book's options: the same answer each time, and room for prompt and answer.
_OPTIONS = {"seed": 123, "temperature": 0, "num_ctx": 2048}


def check_if_running(process_name: str) -> bool:
    """Whether a process with this text in its name runs on this machine, such as "ollama".

    Raises:
        ImportError: psutil is not installed.
    """
    psutil = require("psutil", "check_if_running")
    return any(process_name in (process.info["name"] or "") for process in psutil.process_iter(["name"]))


def query_model(prompt: str, model: str = "llama3", url: str = "http://localhost:11434/api/chat") -> str:
    """Ask a model that Ollama serves.

    Args:
        prompt: the question.
        model: the name by which Ollama knows the model.
        url: the address of its chat interface.

    Returns:
        The whole answer.

    Raises:
        ConnectionError: nothing answers there, or the network is off and the address is not this machine.
        ValueError: the answer is not Ollama's.
    """
    if env.offline() and urlsplit(url).hostname not in _LOCAL:
        raise ConnectionError(f"FASTGPT_OFFLINE forbids the network, and {url} is not on this machine.")
    question = {"model": model, "messages": [{"role": "user", "content": prompt}], "options": _OPTIONS}
    request = urllib.request.Request(url, data=json.dumps(question).encode(), method="POST")
    request.add_header("Content-Type", "application/json")
    try:
        # Ollama streams: one JSON object a line, each with a piece of the answer.
        with urllib.request.urlopen(request) as response:
            lines = response.read().decode("utf-8").splitlines()
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError) as error:
        raise ConnectionError(
            f"{url} does not answer ({error}). Start Ollama (ollama serve) and fetch the model once "
            f"(ollama pull {model})."
        ) from error
    try:
        return "".join(json.loads(line)["message"]["content"] for line in lines if line.strip())
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{url} did not answer as Ollama's chat interface does: {lines[0][:200]!r}") from error


def generate_model_scores(json_data: Sequence[Mapping[str, Any]], json_key: str, model: str = "llama3") -> list[int]:
    """Points from 0 to 100 for the answers that entries hold; shows a progress bar.

    An empty answer gets 0 without asking. Where the judge gives no number, that is printed and the entry left out.

    Args:
        json_data: entries with "instruction", "input", "output" and the answer.
        json_key: the key of the answer, such as "model_response".
        model: see `query_model`.

    Returns:
        The points.

    Raises:
        As `query_model`.
    """
    from tqdm import tqdm

    scores = []
    for entry in tqdm(json_data, desc="Scoring entries"):
        answer = query_model(_question(entry, json_key), model) if entry[json_key] else "0"
        try:
            scores.append(int(answer))
        except ValueError:
            print(f"Could not convert score: {answer}")
    return scores


def _question(entry: Mapping[str, Any], json_key: str) -> str:
    return (
        f"A task was given as:\n{format_input(entry)}\n\nA correct answer is:\n{entry['output']}\n\n"
        f"Rate this answer of a model from 0 (useless) to 100 (best):\n{entry[json_key]}\n\n"
        "Reply with the whole number alone."
    )
