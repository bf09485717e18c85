"""What is a credential, and what only sounds like one; each form in each of the places where texts stand."""

import base64
import contextlib
import json
import sys
import textwrap
import traceback
from collections import Counter
from typing import Any

import pytest
from click.testing import CliRunner

from labtrain.base import credentials
from labtrain.base.credentials import (
    NOT_RECORDED,
    as_references,
    holds_secret,
    names_a_secret,
    remember,
    without_secrets,
)
from labtrain.cli import main

X = "Pl4ntedS3cretV4lue0987"  # stands for the credential wherever its form is free
HEX = "0a1b2c3d4e5f60718293a4b5c6d7e8f9"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA1c7Pl4nted\nS3cretV4lue0987\n-----END RSA PRIVATE KEY-----"

# What a receipt would be given, and the text that must not be in it.
SECRETS: dict[str, tuple[Any, str]] = {
    "a key": ({"api_key": X}, X),
    "a key in camel case": ({"openaiApiKey": X}, X),
    "a variable's name": ({"AWS_SECRET_ACCESS_KEY": X}, X),
    "a name with dashes": ({"x-auth-token": X}, X),
    "a key with dots": ({"logger.wandb.api_key": X}, X),
    "a short one": ({"password": "hunter2"}, "hunter2"),
    "one with spaces": ({"passphrase": "correct horse battery"}, "correct horse"),
    "one with signs": ({"db_passwd": "abc$def#ghij"}, "abc$def"),
    "a password of digits": ({"password": 4455667788}, "4455667788"),
    "one of several": ({"api_key_prod": X}, X),
    "one with a number": ({"password2": "hunter2"}, "hunter2"),
    "passwords": ({"passwords": {"ada": "hunter2"}}, "hunter2"),
    "a name beside its value": ({"env": [{"name": "API_KEY", "value": X}]}, X),
    "a webhook of Power Automate": (f"https://prod-1.westeurope.logic.azure.com:443/workflows/{HEX}", HEX),
    "OAuth": ({"oauth_token": "hunter2"}, "hunter2"),
    "OAuth 2": ({"oauth2_client_secret": "hunter2"}, "hunter2"),
    "OAuth, in one word": ({"oauth2token": "hunter2"}, "hunter2"),
    "OAuth's file": ({"OAuthJSON": "hunter2"}, "hunter2"),
    "OAuth's verifier": ({"oauth_verifier": "hunter2"}, "hunter2"),
    "words in one": ({"accesstoken": "hunter2", "clientsecret": "hunter2"}, "hunter2"),
    "a PEM file's text": ({"pem": "MIIEpAIBAAKCAQEA"}, "MIIEpAIB"),
    "a key and its certificate": ({"server_pem": f"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n{PEM}"}, "MIIEpAIB"),
    "a service account": ({"service_account_json": '{"type": "x", "id": "hunter2"}'}, "hunter2"),
    "a service account's mapping": ({"gcp_service_account_info": {"client_id": "hunter2"}}, "hunter2"),
    "one of two keys of Azure": ({"key1": "kV3xq0T9yLr2+bN7cQ5s/8dZwP1mFhGjK4uE6aXoR+SiBtYvCnDpOeWzUlJ0QxTfHgM9Iy2rA7bV5k8L3sN6Dw=="}, "kV3xq0T9"),
    "the other": ({"key_2": HEX}, HEX),
    "a tok": ({"tok": X}, X),
    "a tok of a name": ({"hf_tok": "hunter2"}, "hunter2"),
    "a pepper": ({"password_pepper": "hunter2"}, "hunter2"),
    "a SAS URL": ({"sas_url": "https://a.blob.core.windows.net/hunter2"}, "hunter2"),
    "a list": ({"tokens": ["abc", "def-ghi"]}, "def-ghi"),
    "a nested mapping": ({"credentials": {"user": "ada", "value": X}}, X),
    "a cookie": ({"headers": {"Cookie": f"sid={X}"}}, X),
    "a bearer": ({"bearer": X}, X),
    "a signing key": ({"signing_key": X}, X),
    "a weak name beside what is random": ({"wandb": {"key": "4c7f0e9b2d1a8f6e5c3b0a9d8e7f6a5b4c3d2e1f"}}, "4c7f0e9b"),
    "an override": (f"+model.api_key={X}", X),
    "an override with quotes": (f"+model.api_key='{X} {X}'", X),
    "an override of a mapping": (f"+model.cfg={{api_key:{X}}}", X),
    "an override of a mapping in a mapping": (f"logger.wandb.settings={{x: 1, api_key: {X}, y: [2]}}", X),
    "an override of a list of mappings": (f"data.sources=[{{url: a, token: {X}}},{{url: b}}]", X),
    "an override of a list": (f"+model.tokens=[{X},b]", X),
    "an override of arguments": ("model.args=[--token,hunter2]", "hunter2"),
    "an override of arguments with quotes": ("model.args=['--token', 'hunter2 x', '--out', x]", "hunter2"),
    "an override of arguments in a list": ("model.jobs=[[fetch,--token,hunter2,--out,x],[1]]", "hunter2"),
    "an override of one argument": ("model.args=[--token=hunter2,b]", "hunter2"),
    "an override of a variable": ("--env=LAB_PASSWORD=hunter2 x", "hunter2 x"),
    "two names before it": ("a=b=password=hunter2 x", "hunter2 x"),
    "overrides in one text": ("seed=1,model.password=hunter2,b=1", "hunter2"),  # hydra.job.override_dirname
    "options of a mount": ("mount -o username=ada,password=hunter2 /x", "hunter2"),
    "a name in a text in quotes": ('notes="with the token=hunter2"', "hunter2"),
    "an override of a mapping of a list": ("+model.cfg={a:1,tokens:[x,hunter2]}", "hunter2"),
    "an override of mappings in a mapping": ("+model.cfg={auth:{user:{name:hunter2}}}", "hunter2"),
    "an override in an exception": ("overrides: ['seed=1', '+model.auth={user:hunter2}', 'a=[--token,hunter2]']", "hunter2"),
    "two arguments": (["curl", "--token", X, "url"], X),
    "arguments in a text": (f"fetch --api-key {X} --out x", X),
    "arguments with =": (f"fetch --password={X} --out x", X),
    "curl's login": (f"curl -u ada:{X} https://h", X),
    "sshpass": ("sshpass -p hunter2 ssh ada@h", "hunter2"),
    "sshpass, in one word": ("/usr/bin/sshpass -v -phunter2 ssh ada@h", "hunter2"),
    "sshpass with quotes": ("sshpass -p 'hunter2 x' ssh ada@h", "hunter2 x"),
    "sshpass in a list": (["sshpass", "-p", "it's hunter2", "ssh", "ada@h"], "hunter2"),
    "sshpass in an override": ("model.command=[sshpass,-p,hunter2,ssh,ada@h]", "hunter2"),
    "sshpass in an exception": ("Command '['sshpass', '-p', 'hunter2 x', 'ssh']' returned 5", "hunter2"),
    "MySQL's client": ("mysqldump -u ada -h h -phunter2 lab", "hunter2"),
    "MySQL's client with quotes": ("mysql -uada -p'hunter2 x' lab", "hunter2 x"),
    "MySQL's client in a list": (["mysql", "-u", "ada", "-phunter2", "lab"], "hunter2"),
    "MongoDB's client": ("mongosh --host h -u ada -p hunter2", "hunter2"),
    "a login of Docker": ("docker login -u ada -p hunter2 h", "hunter2"),
    "Redis' client": ("redis-cli -h h -a hunter2", "hunter2"),
    "LDAP's client": ("ldapsearch -x -D cn=ada -w hunter2 -b x", "hunter2"),
    "curl's login in one word": ("curl -s -uada:hunter2 https://h", "hunter2"),
    "Oracle's driver": ("jdbc:oracle:thin:ada/hunter2@//h:1521/x", "hunter2"),
    "Oracle's driver with @": ({"url": "jdbc:oracle:oci:ada/hun@ter2@h:1521:x"}, "ter2"),
    "Oracle's client": ("sqlplus -S ada/hunter2@h/x", "hunter2"),
    "JSON in a text": (json.dumps({"a": 1, "client_secret": X}), X),
    "JSON in JSON": (json.dumps(json.dumps({"client_secret": X})), X),
    "YAML under an innocent key": ({"extra": f"user: ada\npassword: {X}\nport: 1\n"}, X),
    "a user and a password in a URL": ("postgresql://ada:hunter2@h:5432/db", "hunter2"),
    "a password with @": ("mysql://ada:hun@ter2@h/db", "ter2"),
    "a password alone in a URL": ("redis://:hunter2@h:6379/0", "hunter2"),
    "a token as a URL's user": (f"https://{X}@git.lab/x.git", X),
    "Sentry's DSN": (f"https://{HEX}@o12.ingest.sentry.io/34", HEX),
    "a SAS signature": ("https://a.blob.core.windows.net/c?sv=2024&sig=Zm9vYmFy%2Bx%3D&se=1", "Zm9vYmFy"),
    "a token in a query": ("https://h/x?a=1&token=hunter2&b=2", "hunter2"),
    "a signed URL of S3": (f"https://b.s3.amazonaws.com/x?X-Amz-Date=1&X-Amz-Signature={HEX * 2}", HEX),
    "a token in a fragment": (f"https://h/x#access_token={X}&b=2", X),
    "a connection string of Azure": ("DefaultEndpointsProtocol=https;AccountName=x;AccountKey=Zm9v+YmF/yZm9v==", "Zm9v"),
    "a service bus": (f"Endpoint=sb://x/;SharedAccessKeyName=k;SharedAccessKey={X}=", X),
    "a shared access signature": ("SharedAccessSignature=sv=2024&sig=abcdef", "abcdef"),
    "ODBC": ("Server=h;Uid=ada;Pwd=hunter2;", "hunter2"),
    "libpq": ("host=h password=hunter2 user=ada", "hunter2"),
    "a header": ({"headers": [f"Authorization: Bearer {X}", "Accept: */*"]}, X),
    "basic authorization": ("Basic " + base64.b64encode(b"ada:hunter2").decode(), base64.b64encode(b"ada:hun").decode()[:8]),
    "a bearer in a sentence": (f"401 for Bearer {X}", X),
    "AWS": ("uses AKIAIOSFODNN7EXAMPLE here", "AKIA"),
    "GitHub": ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", "abcdefghij"),
    "GitHub, fine": ("github_pat_11ABCDEFG0abcdefghijkl_mnop", "11ABC"),
    "GitLab": ("glpat-abcdefghij0123456789", "abcdefghij"),
    "Hugging Face": ("hf_abcdefghijklmnopqrstuvwxyz012345", "abcdefghij"),
    "OpenAI": ("sk-proj-abcdefghijklmnopqrstuvwxyz0123456789", "abcdefghij"),
    "Anthropic": ("sk-ant-api03-abcdefghijklmnopqrstuvwxyz", "abcdefghij"),
    "Stripe": ("sk_" + "live_abcdefghijklmnop", "abcdefghij"),
    "Stripe, restricted": ("rk_" + "live_abcdefghijklmnop", "abcdefghij"),
    "Slack": ("xoxb-123456789012-abcdefghijkl", "abcdefghij"),
    "a Slack webhook": ("https://hooks.slack.com/services/T0/B0/abcdefghij", "abcdefghij"),
    "a Discord webhook": ("https://discord.com/api/webhooks/123456/abcdefghij", "abcdefghij"),
    "a Telegram bot": ("https://api.telegram.org/bot123456789:AAabcdefghijklmnopqrstuvwxyz0123456/x", "abcdefghij"),
    "Google": ("AIzaSyA-1234567890abcdefghijklmnopqrstu", "abcdefghij"),
    "a JSON web token": ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghij", "abcdefghij"),
    "SendGrid": ("SG.abcdefghijklmnopqrstuv.abcdefghijklmnopqrstuvwxyz0123456789abcdefg", "abcdefghij"),
    "npm": ("npm_abcdefghijklmnopqrstuvwxyz0123456789", "abcdefghij"),
    "PyPI": ("pypi-AgEIcHlwaS5vcmcabcdefghijklmnop", "abcdefghij"),
    "age": ("AGE-SECRET-KEY-1QQQQQQQQQQQQQQQQQQQQQQQQ", "QQQQQQ"),
    "Vault": ("hvs.CAESIabcdefghijklmnopqrstuvwxyz", "abcdefghij"),
    "Databricks": (f"dapi{HEX}", HEX),
    "a private key under an innocent key": ({"note": PEM}, "MIIEpAIB"),
    "a private key in a line": ({"note": PEM.replace("\n", "\\n")}, "MIIEpAIB"),
    "a PGP key": ("-----BEGIN PGP PRIVATE KEY BLOCK-----\n\nlQOYBF\n-----END PGP PRIVATE KEY BLOCK-----", "lQOYBF"),
    "a stored password": ("$2b$12$abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyza", "abcdefghij"),
    "a dict's key": ({"https://ada:hunter2@h": 1}, "hunter2"),
    "a default of a reference": ({"api_key": "${oc.env:KEY,hunter2}"}, "hunter2"),
    "a default of a variable that names one": ({"x": "${oc.env:HF_TOKEN,hunter2}"}, "hunter2"),
    "beside a reference": ({"password": "hunter2-${oc.env:X}"}, "hunter2"),
    "a path component": ("/srv/cache/ghp_abcdefghijklmnopqrstuvwxyz0123456789/x", "abcdefghij"),
    "bytes": ({"password": X.encode()}, X),
}  # fmt: skip

# What stays as it is, with its key.
INNOCENT: list[Any] = [
    {"tokenizer": "bert-base-uncased"}, {"max_tokens": 512}, {"num_tokens": "1000"}, {"token_ids": ["1", "2"]},
    {"pad_token": "[PAD]"}, {"eos_token": "<|endoftext|>"}, {"sep_token": "|"}, {"unk_token": "unk"},
    {"bos_token": "begin"}, {"mask_token": "***"}, {"additional_special_tokens": ["a", "b"]}, {"pool": "cls_token"},
    {"image_token": "IMG"}, {"prefix_tokens": "4 of them"}, {"token": "cls"}, {"token": "[MASK]"}, {"tokens": [1, 2]},
    {"token_dropout": "0.1"}, {"tokens_per_batch": "4096"}, {"password_file": "/run/x"}, {"secret_name": "lab/key"},
    {"key": "val/acc"}, {"key": "learning_rate"}, {"keys": ["image", "label"]}, {"sort_key": "validation_accuracy_top5"},
    {"monitor": "val/acc"}, {"author": "Ada Lovelace"}, {"auth": "none"}, {"auth": True}, {"token": None}, {"token": ""},
    {"GOOGLE_APPLICATION_CREDENTIALS": "/data/ada/key.json"}, {"session": "2"}, {"session": "monday"}, {"salt": "42"},
    {"authors": ["Ada"]}, {"passes": "3"}, {"compass": "north"}, {"signature": "f32(f32)"}, {"path": "/data/secrets/x.npy"},
    {"commit": "da39a3ee5e6b4b0d3255bfef95601890afd80709"}, {"url": "s3://bucket/run"}, {"url": "sftp://me@host/scratch/me"},
    {"weights": "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
    {"digest": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}, {"uuid": "123e4567-e89b-12d3-a456-426614174000"},
    {"image": "docker.io/lab/train@sha256:e3b0c44298fc1c14"}, {"image": "docker://h:5000/train@sha256:e3b0c442"},
    {"url": "git@github.com:lab/x.git"}, {"url": "https://git@github.com/lab/x.git"}, {"url": "abfs://data@account.dfs.core.windows.net/x"},
    {"url": "https://h:8080/a/b@c"}, {"url": "https://h/search?q=a&page=2&t=30&s=12"}, {"url": "https://huggingface.co/lab/x/resolve/main/w-00001.safetensors"},
    {"mail": "ada@example.org"}, {"run": "task-20240101-some-long-experiment-name-2"}, {"name": "sk-learn-models-and-pipelines"},
    {"name": "disk-2024-01-01-results-of-the-run"}, {"prompt": "Say which token: the first, or the last."},
    {"notes": "the password is asked for; see docs: token rotation"}, {"notes": "Basic knowledge, a bearer of news"},
    {"_target_": "lab.auth.Client"}, {"auth": {"_target_": "lab.auth.Client"}}, {"schedule": {"0": "8", "10": "1"}},
    {"optimizer": "torch.optim.AdamW"}, {"time": "2024-01-01T10:20:30+00:00"}, {"numbers": "1234567890123456"},
    {"pattern": r"(?P<key>\w+)=(?P<value>.*)"}, {"text": "a=b, c=d; e: f"}, {"ssh_key": "~/.ssh/id_ed25519"},
    {"sep_token": "|"}, {"padtoken": "pad"}, {"num_toks": "12"}, {"tok": "bert-base-uncased"}, {"tok": "meta-llama/Llama-2-7b-hf"},
    {"tok": "EleutherAI/pythia-1.4b-v0"}, {"key1": "image"}, {"key2": "val/acc"}, {"key_dim": "64"}, {"keypoints": ["nose", "left_eye_2"]},
    {"monitor_key": "val/acc"}, {"sort_key1": "validation_accuracy_top5"}, {"salt_pepper": "0.1 of them"}, {"salt_and_pepper": "s&p"},
    {"service_account": "train@lab.example"}, {"service_account_json": "/etc/lab/key.json"}, {"service_account_json": "keys/lab.json"},
    {"pem": "/etc/ssl/lab.pem"}, {"ca_pem": "certs/lab.pem"}, {"ca_pem": "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----"},
    {"oauth_url": "https://h/oauth2/token"}, {"oauth_client_id": "lab"}, {"oauth_provider": "lab"}, {"temper": "high"}, {"stok": "abc"},
    {"auth": 0.0001234}, {"secret": 3.14159265}, {"token": 1e-05}, {"tokens": [0.0001234]}, {"bos_token_id": 151643}, {"tokens": 1000000}, {"password": True}, {"name": "token", "value": None},
    {"public": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKpublic me@h"}, {"password": "${oc.env:DB_PASSWORD}"},
    {"api_key": "${oc.env:KEY,null}"}, {"api_key": "${oc.env:KEY,''}"}, {"headers": {"Authorization": "Bearer ${oc.env:KEY}"}},
    {"url": "https://${oc.env:USER}:${oc.env:PASSWORD}@h/x"}, {"token": "$HF_TOKEN"}, {"token": "(not recorded)"},
    "model.args=[--tokenizer,bert,--max-tokens,20]", "model.ids={pad_token:[PAD],token_ids:[1,2]}", "data.ids={tokens:[1, 2]}",
    "jdbc:oracle:thin:@//h:1521/x", "jdbc:oracle:thin:/@lab", "sqlplus / as sysdba", "sqlplus /nolog", "sshpass -e ssh -p 22 h",
    "sshpass -f file ssh -p 2222 h", "mysql -u ada -p lab", ["mysql", "-u", "ada", "-p", "lab"], "mysql -h h; ls -part",
    "docker run -p 80:80 -u 1000:1000 lab", "docker login -u ada --password-stdin h", "redis-cli -h h -p 6379", "curl -u ada h",
    "model.client={auth:{type:none,retries:3,_target_:lab.Auth}}", "x={auth: {user: '${oc.env:USER}', password: '${oc.env:P}'}}",
    ["docker", "run", "-p", "80:80"], "rsync -e ssh ada@h:x y", "data.tokens=[1,2]", "a=b=c", "--env=LAB_ROOT=/data", "one of --token, --user or --password, and no more",
    "trainer.max_epochs=3", "model.tokenizer=bert", "data.pad_token=[PAD]", "'checkpoint.monitor=val/acc'", "+model.token=cls",
    "model.api_key=${oc.env:KEY}", "-m", "seed=1,2,3", "data.url=https://h/x?split=train&rev=main", "--config-name=token",
    ["train.py", "--tokenizer", "bert"], ["--max-tokens", "20"], 3, 2.5, None, True, "", {"a": {}}, [[]],
]  # fmt: skip


@pytest.mark.parametrize("kind", SECRETS)
def test_a_credential_is_taken_out(kind: str) -> None:
    """Wherever it stands; and to clean twice is to clean once."""
    given, secret = SECRETS[kind]
    found = without_secrets(given)
    assert secret not in json.dumps(found, default=bytes.decode)
    assert NOT_RECORDED in json.dumps(found, default=bytes.decode)
    assert without_secrets(found) == found
    deep = without_secrets({"a": [{"b": (given, 1)}], "notes": [f"with {given}"] if isinstance(given, str) else []})
    assert secret not in str(deep)


@pytest.mark.parametrize("given", INNOCENT, ids=str)
def test_what_only_sounds_like_one_stays(given: Any) -> None:
    """The very same object: nothing was changed."""
    assert without_secrets(given) is given
    assert without_secrets({"a": [given]}) == {"a": [given]}


def test_what_stands_beside_a_credential_stays() -> None:
    assert without_secrets("https://h/x?a=1&token=hunter2&b=2") == f"https://h/x?a=1&token={NOT_RECORDED}&b=2"
    assert without_secrets("host=h password=hunter2 user=ada") == f"host=h password={NOT_RECORDED} user=ada"
    assert without_secrets("redis://:hunter2@h/0") == f"redis://{NOT_RECORDED}@h/0"
    assert without_secrets("Bearer abc" + X) == f"Bearer {NOT_RECORDED}"
    assert without_secrets({"api_key": "${oc.env:KEY,hunter2}"}) == {"api_key": f"${{oc.env:KEY,{NOT_RECORDED}}}"}
    assert without_secrets({"Authorization": "Basic ${oc.env:KEY}"}) == {"Authorization": "Basic ${oc.env:KEY}"}
    assert without_secrets(("a", ["--token", X, 3])) == ("a", ["--token", NOT_RECORDED, 3])


PATCH = textwrap.dedent("""\
    diff --git a/model.py b/model.py
    --- a/model.py
    +++ b/model.py
    @@ -1,2 +1,9 @@
    +def encode(token: str, password=None, api_key="", mode="token"):
    +    self.token = token
    +    pad_token = tokenizer.pad_token
    +    key = os.environ["API_KEY"]
    +    parser.add_argument("--token", default="none")
    +    url = f"https://{user}:{password}@{host}/x"
    +    return {"token": token, "password": password, "tokens": "a b c"}
    """)


def test_a_patch_stays_code() -> None:
    """Names of variables and arguments are no values; a literal that is given to one is."""
    assert without_secrets(PATCH) is PATCH
    for line in ("password = 'hunter2-xyz'", 'os.environ["HF_TOKEN"] = "abc123def"', 'f(api_key="abc123def")',
                 'token: str = "abc123def"', '{"client_secret": "abc123def"}'):  # fmt: skip
        found = without_secrets(f"{PATCH}+{line}\n")
        assert found.startswith(PATCH), line
        assert NOT_RECORDED in found.removeprefix(PATCH), line
        assert not holds_secret(PATCH)
        assert holds_secret(line)
    other = (
        "diff --git a/conf/config.yaml b/conf/config.yaml\n--- a/x\n+++ b/x\n@@ -1 +1,2 @@\n a: 1\n+api_key: abcdef\n"
    )
    assert "abcdef" not in without_secrets(PATCH + other)


@pytest.mark.parametrize("environment", [True, False])
def test_a_value_that_is_known_is_taken_out_of_any_text(environment: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a variable that names one, or of the configuration: in the text of an exception, in a path, as base64."""
    monkeypatch.setattr(credentials, "_given", {})
    if environment:
        monkeypatch.setenv("LAB_TOKEN", "s3cr3t/value")
    else:
        remember({"model": {"api_key": "s3cr3t/value", "pool": "cls"}, "command": ["x.password=s3cr3t/value"]})
    instead = "${oc.env:LAB_TOKEN}" if environment else NOT_RECORDED
    assert without_secrets("401 for s3cr3t/value!") == f"401 for {instead}!"
    assert without_secrets("/scratch/s3cr3t/value/x") == f"/scratch/{instead}/x"
    assert without_secrets("/scratch/s3cr3t%2Fvalue/x") == f"/scratch/{instead}/x"
    assert without_secrets(base64.b64encode(b"s3cr3t/value").decode()) == instead
    assert without_secrets("s3cr3t/values") == "s3cr3t/values"


def test_a_value_that_could_be_any_word_is_taken_out_of_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A database's password may be `postgres`, the working directory stands in PWD."""
    monkeypatch.setattr(credentials, "_given", {})
    monkeypatch.setenv("DB_PASSWORD", "postgres")
    monkeypatch.setenv("PIN_CODE", "123456")
    monkeypatch.setenv("PWD", "/srv/Somewhere1")
    text = "postgres 123456 /srv/Somewhere1"
    assert without_secrets(text) is text


def test_a_value_of_the_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """In what is loaded again: keys and texts of a state; of the configuration's references, and of variables."""
    monkeypatch.setattr(credentials, "_given", {})
    monkeypatch.setattr(credentials, "_referred", {})
    monkeypatch.setenv("LAB_TOKEN", r"s3cr3t\value")
    remember({"callbacks": {"stop": {"monitor": X}}}, [(["callbacks", "stop", "monitor"], "${oc.env:M,loss}")])
    state = {
        f"EarlyStopping{{'monitor': '{X}'}}": {
            "best": f"/a/{X}/b",
            "n": Counter({X: 2}),
            "others": [(r"s3cr3t\value", 1.5)],
        }
    }
    hidden = as_references(state)
    assert X not in str(hidden)
    assert "s3cr3t" not in str(hidden)
    assert list(hidden) == ["EarlyStopping{'monitor': '${oc.env:M,(not recorded)}'}"]
    assert as_references(hidden) == hidden
    assert as_references(hidden, back=True) == state
    assert type(as_references(hidden, back=True)[next(iter(state))]["n"]) is Counter
    assert as_references(state, back=True) == state
    monkeypatch.setenv("LAB_TOKEN", "another-v4lue")
    assert as_references({"a": "${oc.env:LAB_TOKEN}"}, back=True) == {"a": "another-v4lue"}


def test_names() -> None:
    for name in (
        "WANDB_API_KEY",
        "hfToken",
        "HFToken",
        "db.password",
        "client-secret",
        "Set-Cookie",
        "APIKey",
        "tokens",
    ):
        assert names_a_secret(name), name
    for name in (
        "PWDS",
        "tokenizer",
        "pad_token",
        "PadToken",
        "max_new_tokens",
        "author",
        "key",
        "SSH_AUTH_SOCK",
        "cookie_cutter",
    ):
        assert not names_a_secret(name), name


def test_what_is_printed_is_clean(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra's list of a job's overrides, a traceback."""
    monkeypatch.setattr(credentials, "_given", {})
    remember({"api_key": X})
    monkeypatch.setattr(sys, "stderr", credentials.CleanStream(sys.stderr))
    sys.stderr.write("Error executing job with overrides: ['seed=1', '+model.other={api_key:PLANTED}', '+model.a=b']\n")
    with contextlib.suppress(RuntimeError):
        try:
            raise RuntimeError(f"401 for {X}")
        finally:
            traceback.print_exc()
    said = capsys.readouterr().err
    assert f"['seed=1', '+model.other={{api_key:{NOT_RECORDED}}}', '+model.a=b']" in said
    assert f"RuntimeError: 401 for {NOT_RECORDED}\n" in said
    assert "PLANTED" not in said


def test_an_error_of_a_command_is_clean() -> None:
    done = CliRunner().invoke(main, ["digest", "runs/password=pLANT3D9"])
    assert done.exit_code == 2
    assert f"password={NOT_RECORDED}" in done.stderr
    assert "pLANT3D9" not in done.stderr


@pytest.mark.parametrize("text", [
    "a" * 1_000_000, "a-" * 500_000, "a=" * 500_000, '"' * 300_000, "a: b\n" * 200_000, "://" * 300_000, PATCH * 500,
    "{" * 300_000, "sk-" * 300_000, "token: [" * 100_000, "token: {'" * 100_000, "[--token," * 100_000, "key=" * 200_000,
    "oracle:thin:" * 100_000, "mysql -u " * 100_000,
])  # fmt: skip
def test_a_long_text_without_a_credential_stays(text: str) -> None:
    """A patch of megabytes, a text without a space: a pattern that is not linear would take hours."""
    assert without_secrets(text) == text
