"""What is staged for a job, under which name, where, and what its container is asked."""

import re

import pytest

from kubetune_contract.staging import StageSource
from kubetune_operator import names, stagers
from kubetune_operator.contents import contents, folder_of
from kubetune_operator.sources import DataPlace, ModelSource

BUCKET = {"uri": "s3://acme-models/llama/Tiny One", "endpoint": "https://minio.storage.svc:9000", "region": "eu-1"}


def place(**given):
    return DataPlace.model_validate(given)


def model(**given):
    return ModelSource.model_validate(given)


FOLDERS = {
    "a model on the volume": (model(volumePath="models/llama"), r"models/llama"),
    "a model of the hub": (model(huggingFace={"repo": "acme/llama"}), r"huggingface/acme--llama-[0-9a-f]{10}"),
    "data of the hub": (place(huggingFace={"repo": "acme/chats"}), r"huggingface/datasets--acme--chats-[0-9a-f]{10}"),
    "a folder of a bucket": (model(s3=BUCKET), r"s3/acme-models--Tiny-One-[0-9a-f]{10}"),
    "a whole bucket": (place(s3={"uri": "s3://acme-chats"}), r"s3/acme-chats---[0-9a-f]{10}"),
}


@pytest.mark.parametrize(("source", "pattern"), FOLDERS.values(), ids=FOLDERS.keys())
def test_a_folder_says_what_is_in_it(source, pattern):
    assert re.fullmatch(pattern, folder_of(source))


HUB = {"repo": "acme/chats"}
OTHERS = {
    "another split": ({"huggingFace": HUB}, {"huggingFace": HUB | {"split": "test"}}),
    "another file": ({"huggingFace": HUB}, {"huggingFace": HUB | {"path": "a.jsonl"}}),
    "another prefix": ({"s3": BUCKET}, {"s3": BUCKET | {"uri": "s3://acme-models/llama/Tiny-One"}}),
    "another service": ({"s3": BUCKET}, {"s3": BUCKET | {"endpoint": "https://s3.example"}}),
    "other files": ({"s3": BUCKET}, {"s3": BUCKET | {"ignorePatterns": ["*.md"]}}),
}


@pytest.mark.parametrize(("one", "other"), OTHERS.values(), ids=OTHERS.keys())
def test_other_files_lie_in_another_folder(one, other):
    assert folder_of(place(**one)) != folder_of(place(**other))


SECRETS = {
    "a token": ({"huggingFace": HUB}, {"huggingFace": HUB | {"tokenSecretRef": {"name": "hf"}}}),
    "credentials": ({"s3": BUCKET}, {"s3": BUCKET | {"credentialsSecretRef": {"name": "bucket"}}}),
}


@pytest.mark.parametrize(("one", "other"), SECRETS.values(), ids=SECRETS.keys())
def test_a_secret_makes_another_job_and_the_same_folder(one, other, job):
    first = contents(job(dataset={"volumePath": None, **one}).spec)[1]
    second = contents(job(dataset={"volumePath": None, **other}).spec)[1]
    assert first.path == second.path
    assert names.stage_name(job().spec, first) != names.stage_name(job().spec, second)


def test_a_model_and_data_of_one_bucket_do_not_share_a_job(job):
    bot = job(model={"volumePath": None, "s3": BUCKET}, dataset={"volumePath": None, "s3": BUCKET})
    one, other = contents(job(model={"volumePath": None, "s3": BUCKET}).spec)[0], contents(bot.spec)
    assert names.stage_name(bot.spec, one) == names.stage_name(bot.spec, other[0])
    assert len(contents(bot.spec)) == 2
    assert len({names.stage_name(bot.spec, content) for content in other}) == 2


def test_a_section_that_cannot_be_read_stages_nothing(job):
    assert len(contents(job(dataset={"huggingFace": HUB}).spec)) == 1  # and a volumePath: run_config() refuses both


SOURCES = {
    "data of the hub": (
        {"huggingFace": HUB | {"revision": "v1", "path": "data/a.jsonl", "ignorePatterns": ["*.md"]}},
        {"repo": "acme/chats", "revision": "v1", "file": "data/a.jsonl", "ignorePatterns": ["*.md"]},
    ),
    "a split": ({"huggingFace": HUB | {"split": "test"}}, {"repo": "acme/chats", "split": "test"}),
    "a bucket": (
        {"s3": BUCKET | {"ignorePatterns": ["a/*"], "credentialsSecretRef": {"name": "bucket"}}},
        {**BUCKET, "ignorePatterns": ["a/*"]},
    ),
}


def container(manifest):
    (found,) = manifest["spec"]["template"]["spec"]["containers"]
    return found


@pytest.mark.parametrize(("given", "asked"), SOURCES.values(), ids=SOURCES.keys())
def test_the_container_is_asked_for_it(given, asked, job, settings):
    bot = job(dataset={"volumePath": None, **given})
    content = contents(bot.spec)[1]
    text = container(stagers.stage_job(bot, content, settings))["args"][-1]
    expected = {"content": "Dataset", "path": content.path, **asked}
    assert StageSource.model_validate_json(text) == StageSource.model_validate(expected)
    assert "bucket" not in text


def test_credentials_come_from_the_secret_and_the_session_token_may_be_absent(job, settings):
    bot = job(model={"volumePath": None, "s3": BUCKET | {"credentialsSecretRef": {"name": "bucket"}}})
    variables = container(stagers.stage_job(bot, contents(bot.spec)[0], settings))["env"]
    found = {one["name"]: one["valueFrom"] for one in variables if one["name"].startswith("AWS_")}
    assert found == {
        "AWS_ACCESS_KEY_ID": {"secretKeyRef": {"name": "bucket", "key": "AWS_ACCESS_KEY_ID"}},
        "AWS_SECRET_ACCESS_KEY": {"secretKeyRef": {"name": "bucket", "key": "AWS_SECRET_ACCESS_KEY"}},
        "AWS_SESSION_TOKEN": {"secretKeyRef": {"name": "bucket", "key": "AWS_SESSION_TOKEN", "optional": True}},
    }


def test_an_administrator_decides_when_every_byte_is_read_again(job, settings):
    strict = settings.model_copy(update={"staged_trust_seconds": 0.0})
    text = container(stagers.stage_job(job(), contents(job().spec)[0], strict))["args"][-1]
    assert StageSource.model_validate_json(text).trusted_seconds == 0
