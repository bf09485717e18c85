"""Decide what is a credential. Everything that leaves the process passes through `without_secrets` first.

A text is a credential, or contains one, by

==================== ==================================================================================================
its key              `api_key`, `password`, `wandbToken`; not `pad_token`, `max_tokens`, `tokenizer`
a name beside it     in a text: `password=...`, `{api_key: ...}`, `--token ...`, `AccountKey=...`, `?sig=...`
its place in a line  of a program that takes one: `sshpass -p ...`, `mysql -p...`
its form             the forms of services: `ghp_...`, `AKIA...`, a JSON web token, a private key
its place in a URL   `user:password@`, and the paths of webhooks
how random it looks  only next to a weaker name: `key`, `session`, `webhook`; digests and ids are everywhere
its value            the value of a variable with a credential's name, or one from the configuration (`remember`)
==================== ==================================================================================================

The rules of detect-secrets 1.5 found 15 of 44 forms of credentials in a comparison: they look for lines of source code
and support neither overrides nor nested keys. So labtrain has its own list.

`${oc.env:X}` is a configuration's reference to a credential. It is recorded unchanged, and whoever runs the
configuration again needs X in the environment.
"""

import base64
import binascii
import copy
import math
import os
import re
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, TextIO, TypeVar, cast

NOT_RECORDED = "(not recorded)"

# Names, as words: `openaiApiKey` and `OPENAI-API-KEY` end in "api key".
SECRET_KEY = re.compile(
    r"(?:^| )(?:passwords?|passwd|pass ?phrase|passcode|pwd|pw|psk|passwort|kennwort"
    r"|secrets?|tokens?|jwt|bearer|auth|authorization|credentials?"
    r"|creds?|cookies?|sas(?: ur[li])?|connection ?string|conn ?str|pem|(?<!salt )(?<!salt and )pepper"
    r"|(?:api|access|secret|private|account)keys?|(?:client|app)secret|(?:o?auth\d?|api|access|refresh)tokens?"
    r"|(?:api|auth|access|refresh|bot|hf|gh|git) toks?|service account info|(?:code|o ?auth\d?) verifier"
    r"|(?:api|access|secret|private|account|signing|encryption|decryption|master|shared|shared access|storage|auth|app"
    r"|application|service|session|subscription|license|deploy|service account|refresh|consumer|client|webhook|hmac)"
    r" keys?|(?:access|secret|api|private) key id"
    r"|shared access signature|x amz signature|session ?id|sessid|sid|webhook(?: url)?|sentry dsn|pin code|t?otp|mfa"
    r"|csrf|oauth|(?:o?auth\d?|access|activation|recovery) codes?|seed phrase|mnemonic|service account(?= json))"
    # a suffix that says which of several
    r"(?: ?v?\d+)?(?: (?:value|prod|production|dev|staging|live|read|write|bot|github|gitlab|hf|confirm|confirmation"
    r"|repeat|old|current|primary|secondary|backup|json|pem|b64|base64))?(?: ?v?\d+)?$"
)
# Names of tokens of text or of counts, not of credentials.
OF_TEXT = re.compile(
    r"(?:^| )(?:pad|padding|eos|bos|sos|unk|unknown|cls|sep|separator|mask|masked|special|start|stop|end|begin|image"
    r"|img|video|audio|vision|visual|speech|text|word|class|prefix|suffix|middle|fim|register|distillation|newline|eot|eod"
    r"|eoc|bor|eor|boi|eoi|think|thinking|num|max|min|n|new|total|per|of|query|patch|latent|prompt|turn|role|tool|blank|target"
    r"|source|src|tgt|input|output|first|last|next|split|merge|forced|bad|decoder|language|lang|extra|added|additional|unused"
    r"|reserved|vocab|sentinel|trigger|placeholder|object|time|state|action|memory|context|completion|generated|draft|seq"
    r"|sequence|ignore|pooled|mean|all|by|drop) tokens?$"
)
# Next to these names, a text is a credential if it looks random.
WEAK_KEY = re.compile(
    r"(?:^| )(?:keys?|toks?|pass|session|sess|login|dsn|hook|pat|pin|salt|licen[cs]e|sig|signature|nonce)(?: ?v?\d+)?$"
)
# Values under such names that select a method and are not credentials.
PLAIN_WORDS = re.compile(
    r"(?i)(?:none|null|true|false|yes|no|on|off|auto|default|basic|digest|bearer|token|oauth2?|iam|ntlm|kerberos|anon"
    r"|anonymous|disabled|enabled|required|optional|env|environment|netrc|keyring|prompt|str|string|text|cls|mean|VALUE,?)"
)
_WORD = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2,}(?![A-Za-z0-9])")
MARKER = re.compile(r"\[[A-Z_]{2,16}\]|<[^<>\s]{1,30}>")  # "[PAD]" under model.token is not a credential
# Placeholders in program text, f"{user}:{password}@", or a shell variable.
PLACEHOLDER = re.compile(r"\{\w*\}|%s|\$\w+|<\w+>|\0\d+\0")
REFERENCE = re.compile(r"\$\{oc\.(?:env|decode):(?:[^{}]|\$\{(?:[^{}]|\$\{[^{}]*\})*\})*\}")

# A name in a text, and its value, up to the end that this kind of text has.
_NAME = r"(?<![\w.])(?<![\w.]-)(?P<name>[A-Za-z_][\w.\-]{0,200})"
_QUOTED = r"(?P<quote>\\?[\"'])(?P<quoted>(?:(?!(?P=quote)).)*)(?P=quote)"
_BARE = r"(?P<bare>[^\s;&\"'{}<>|][^\s;&\"'<>|]*)"
_ITEM = r"[^\[\]{}\"'\n]|\"[^\"\n]*\"|'[^'\n]*'"
_GROUP = rf"[\[{{](?:{_ITEM})*+[\]}}]"  # a list or a mapping in one line, as an override or JSON has it
for _ in range(2):  # in another one
    _GROUP = rf"[\[{{](?:{_ITEM}|{_GROUP})*+[\]}}]"
_BEFORE_VALUE, _VALUE = re.compile(rf"{_NAME}(?:=|%3[Dd])"), re.compile(rf"{_GROUP}|{_QUOTED}|{_BARE}")
_BEFORE_GROUP, _WHOLE_GROUP = re.compile(rf"{_NAME}\\?[\"']?[ \t]*:[ \t]*(?=[\[{{])"), re.compile(_GROUP)
_MAPPED = re.compile(  # YAML and JSON
    rf"(?<![^{{,\s\"'+\-]){_NAME}(?P<sign>\\?[\"']?[ \t]*:[ \t]*)"
    rf"(?:{_QUOTED}|(?P<bare>[^\s,}}\]\"'\[{{|>][^,}}\]\"'\n]*))"
)
_HEADER = re.compile(
    r"(?P<name>\b(?:(?:proxy-)?authorization|(?:set-)?cookie|x-[\w\-]*(?:token|key|secret|auth|signature)))"
    r"(?P<sign>\s*:\s*)(?P<bare>(?:(?:bearer|basic|token|digest)\s+)?[^\s\"'][^\"'\n]*)",
    re.IGNORECASE,
)
_LISTED = re.compile(  # [--token, VALUE]
    r"(?:(?<=[\[(,\"'])|(?<=, ))(?P<name>--?[A-Za-z][\w\-]*)(?P<sign>\\?[\"']?\s*,\s*)"
    rf"(?:{_QUOTED}|(?P<bare>(?![\-\s])[^,\[\](){{}}\"'\n]+))(?=\s*[,\])])"
)
_TYPED = re.compile(r"(?:[\w+~.@/\-\[\]]+=){1,9}")  # an override; or several names, of which the last may be the one
_OPTION = re.compile(r"(?<!\S)(?P<name>--?[A-Za-z][\w\-]*)(?P<sign>\s+)(?P<bare>(?!-)\S+)")
_LOGIN = re.compile(r"(?<!\S)(?P<sign>(?:-u|--user)[\s=])(?P<bare>(?!\d+:\d+(?!\S))[^\s:]+:\S+)")  # curl's
# Programs whose short option takes a password: as a shell's line, or as a list of words (of \x1f: `_of_command`).
_APART, _WORDS = r"[\s,\"'\x1f]++", r"(?:[\s,\"'\x1f]+[^\s,\"'\x1f|;&]+){0,20}?[\s,\"'\x1f]+"
_COMMAND = re.compile(
    rf"(?P<sign>(?<![\w\-])(?:sshpass(?:{_APART}-[hvV])*{_APART}-p(?:{_APART})?+"
    rf"|(?:(?:docker|podman) login|mongo\w*){_WORDS}-p{_APART}|redis-cli{_WORDS}-a{_APART}"
    rf"|ldap\w+{_WORDS}-w(?:{_APART})?+"
    rf"|(?:(?:mysql|mariadb)[\w\-]*{_WORDS}-p|curl{_WORDS}-u)(?![\"'\x1f]?(?:[\s,\])]|$))[\"']?))"
    r"(?!\(not )(?:(?<=')[^'\n]+|(?<=\")[^\"\n]+|(?<=\x1f)[^\x1f]+|[^\s\"'|;&\x1f]+)"
)
_CODE = re.compile(rf"{_NAME}(?P<sign>[\"']?\]?\s*(?::\s*\w+\s*)?[=:]\s*[rbuRBU]?){_QUOTED}")
_QUERY = re.compile(r"(?P<name>(?<=[?&#;])[\w.\-]+)(?P<sign>=)(?P<bare>[^&#\s\"'<>;]+)")
_QUERY_KEY = re.compile(r"(?:^| )(?:sig|signature|key|code|credential|session|hmac|hash|policy|state|ticket|s|t)$")
_SCHEME = re.compile(r"(?i)\b(bearer|basic|token|apikey)(\s+)([\w+/=.~\-]{8,})")

_END = r"(?![A-Za-z0-9])"
SECRET_VALUE = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----|$)"
    r"|PuTTY-User-Key-File-\d[\s\S]*"
    # user:password@; with http a name alone is a token
    r"|(?<=://)[^/\s:@\"'<>?#$]*:[^/\s\"'<>?#]+(?=@)"
    r"|(?<=https://)(?!git@|\$)[^/\s:@\"'<>?#]+(?=@)|(?<=http://)(?!git@|\$)[^/\s:@\"'<>?#]+(?=@)"
    # Oracle's user/password@
    r"|(?:(?<=oracle:thin:)|(?<=oracle:oci:)|(?<=oracle:oci8:)|(?<=sqlplus )|(?<=sqlplus -[A-Za-z] ))"
    r"[^\s/@\"'\-][^\s/@\"']{0,99}/[^\s\"']{1,200}(?=@)"
    # the paths of webhooks
    r"|(?<=hooks\.slack\.com/)[\w/\-]+|(?<=/api/webhooks/)\d+/[\w\-]+|(?<=webhook\.office\.com/)[^\s\"']+"
    r"|(?<=hooks\.zapier\.com/hooks/)[\w/\-]+|(?<=/with/key/)[\w\-]+|(?<=api\.telegram\.org/bot)\d+:[\w\-]+"
    r"|(?<=logic\.azure\.com/)[^\s\"'(]+|(?<=logic\.azure\.com:443/)[^\s\"'(]+"
    r"|(?<=/webhooks/)\d{10,}/[\w\-]{20,}|(?<=open\.larksuite\.com/open-apis/bot/)[\w/\-]+|(?<=/webhook/)[\w\-]+@[^\s\"']+"
    r"|(?<=/hooks/)[a-z0-9]{26}\b|(?<=chat\.googleapis\.com/)[^\s\"']+"
    r"|(?<=open\.feishu\.cn/open-apis/bot/)[\w/\-]+"
    # what services give
    r"|(?<![A-Za-z0-9_])(?:"
    rf"(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{{16}}{_END}"  # Amazon
    r"|gh[pousr]_\w{20,}|github_pat_\w{20,}|gl(?:pat|dt|rt|cbt|ptt|ft|soat|imt|agent)-[\w\-]{16,}|GR1348941[\w\-]{16,}"
    r"|ATATT3[\w\-=]{20,}|ATBB[A-Za-z0-9]{20,}|bb_pat_\w{16,}"
    r"|hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|r8_[A-Za-z0-9]{20,}|gsk_[A-Za-z0-9]{20,}|pplx-[A-Za-z0-9]{20,}"
    r"|xai-[A-Za-z0-9]{20,}|nvapi-[\w\-]{20,}|wandb_v\d_\w{20,}|KGAT_\w{16,}|lsv2_(?:pt|sk)_\w{20,}|pcsk_\w{20,}"
    r"|sk-(?=[\w\-]{0,80}\d)[\w\-]{20,}|sk_[0-9a-f]{40,}|[sr]k_(?:live|test|prod)_\w{10,}|whsec_[\w+/=]{16,}"
    r"|xox[abeoprs]-[\w\-]{10,}|xapp-\d-[\w\-]{10,}"
    r"|AIza[\w\-]{30,}|ya29\.[\w\-]{20,}|GOCSPX-[\w\-]{20,}|1//0[\w\-]{20,}"  # Google
    r"|eyJ[\w\-]{8,}\.eyJ[\w\-]{8,}(?:\.[\w\-]*)?|eyJhcGlfYWRk[\w=]{20,}|eyJrIjoi[\w=]{20,}"  # JWT, Neptune, Grafana
    r"|SG\.[\w\-]{16,}\.[\w\-]{16,}|SK[0-9a-f]{32}\b|key-[0-9a-f]{32}\b|[0-9a-f]{32}-us\d{1,2}\b"  # mail and telephone
    r"|npm_[A-Za-z0-9]{30,}|pypi-[\w\-]{20,}|rubygems_[0-9a-f]{32,}|AKCp[A-Za-z0-9]{20,}|dckr_(?:pat|oat)_[\w\-]{16,}"
    r"|cio[A-Za-z0-9]{32}\b|nfp_\w{20,}|HRKU-[\w\-]{20,}|sbp_[0-9a-f]{20,}|tskey-[\w\-]{12,}"
    r"|FlyV1 \S{20,}|fo1_[\w\-]{20,}"
    r"|AGE-SECRET-KEY-1[0-9A-Z]{20,}|dapi[0-9a-f]{32}|do[opr]_v1_[0-9a-f]{32,}|dp\.(?:pt|st|ct|sa|scim|audit)\.\w{20,}"
    r"|sl\.[\w\-]{40,}|shp(?:at|ca|pa|ss)_[0-9a-fA-F]{20,}|sq0[a-z]{3}-[\w\-]{16,}|EAAA[\w\-]{40,}"
    r"|pscale_(?:tkn|pw|oauth)_[\w\-.]{16,}|PMAK-[0-9a-f\-]{24,}|pul-[0-9a-f]{32,}|[A-Za-z0-9]{14}\.atlasv1\.[\w\-]{20,}"
    r"|hv[sbr]\.[\w\-]{20,}|glc_[\w+/=]{20,}|glsa_\w{20,}|NR(?:AK|JS|II|RA)-[\w\-]{16,}|lin_api_\w{20,}|ntn_\w{20,}"
    r"|secret_[A-Za-z0-9]{40,}|figd_[\w\-]{20,}|pat[A-Za-z0-9]{14}\.[0-9a-f]{40,}|\d{8,10}:AA[\w\-]{30,}"
    r"|sntry[su]_[\w+/=\-]{20,}|bkua_[0-9a-f]{20,}|CCIPAT_\w{20,}|shippo_(?:live|test)_[0-9a-f]{20,}|dt0c01\.[\w.]{40,}"
    r"|EZ[AT]K[0-9A-Za-z]{40,}|ops_eyJ[\w=\-]{20,}|[\w~.\-]{3}[78]Q~[\w~.\-]{31,34}|oy2[a-z0-9]{43}\b"
    r"|\$(?:2[abxy]|5|6|y|argon2id?)\$[\w./$=,+\-]{20,}|\{(?:SSHA|SHA|CRYPT)\}[\w+/=$.]{20,}"  # stored passwords
    r")"
)

T = TypeVar("T")

_given: dict[str, str] = {}  # values passed to `remember`, and their replacements
_referred: dict[str, str] = {}  # those of them from the environment


def without_secrets(node: T, *, secret: bool = False, names: bool = True) -> T:
    """Return nested dicts, lists and texts without credentials; the same object if there are none.

    Args:
        node: what leaves the process.
        secret: it is under a key that names a credential, so each text in it is one.
        names: consider keys of dicts. Not for names that nobody chose for a value, such as those of distributions.
    """
    return cast(T, _cleaned(node, secret, names, list(_values())))


def _cleaned(node: object, secret: bool, names: bool, values: list[tuple[str, str]]) -> object:
    def again(child: object, secret: bool) -> Any:
        return _cleaned(child, secret, names, values)

    if isinstance(node, str):
        found = _without(node, values, secret=secret)
        return node if found == node else found
    if isinstance(node, Mapping):
        done: dict[object, object] = {}
        named = node.get("name") or node.get("key")  # [{name: API_KEY, value: ...}]
        of_value = ("value", "val") if isinstance(named, str) and names_a_secret(named) else ()
        for key, value in node.items():
            under = (secret and key != "_target_") or (names and key in of_value)
            if names and isinstance(key, str) and _is_secret_number(key, value):
                value, under = str(value), True
            if names and isinstance(key, str):
                weak = isinstance(value, str) and WEAK_KEY.search(_words(key)) is not None and looks_random(value)
                under = under or weak or (names_a_secret(key) and not _is_place(key, value))
            done[again(key, False) if isinstance(key, str) else key] = again(value, under)
        same = len(done) == len(node) and all(
            a is b and value is done[a] for a, (b, value) in zip(done, node.items(), strict=True)
        )
        return node if same else done
    if isinstance(node, list | tuple):
        after = [False, *(names and _names_option(item) for item in node)]
        words = _of_command(node)
        items = [again(item, secret or is_given) for item, is_given in zip(words, after, strict=False)]
        if all(a is b for a, b in zip(items, node, strict=True)):
            return node
        return items if isinstance(node, list) else type(node)(*items) if hasattr(node, "_fields") else tuple(items)
    if isinstance(node, bytes):
        text = node.decode("utf-8", "surrogateescape")
        cleaned = _without(text, values, secret=secret)
        return node if cleaned == text else cleaned.encode("utf-8", "surrogateescape")
    return node


@lru_cache(maxsize=1 << 12)
def names_a_secret(key: str) -> bool:
    """Return whether a key or variable of this name has a credential as its value."""
    words = _words(key)
    return SECRET_KEY.search(words) is not None and OF_TEXT.search(words) is None


def holds_secret(text: str) -> bool:
    """Return whether source code contains a credential: a literal with a credential's name or form."""
    return _CODE.sub(_in_code, SECRET_VALUE.sub(_by_form, text)) != text


def remember(config: Any, references: Iterable[tuple[Sequence[object], str]] = ()) -> None:
    """Remember a configuration's credentials, so that they are removed from every text that this process passes on.

    Args:
        config: resolved.
        references: (path, text) of values from the environment; not all of them are credentials.
    """
    for value in _hidden_in(config, without_secrets(config)):
        _given.update(dict.fromkeys(_forms(value), NOT_RECORDED))
    for path, text in references:
        value = config
        for part in path:
            value = value[part]
        names = [str(path[-1]), *re.findall(r"\$\{oc\.env:([^,{}]+)", text)]
        if isinstance(value, str) and (any(map(names_a_secret, names)) or looks_random(value)):
            _given.update(dict.fromkeys(forms := list(_forms(value)), _default_hidden(text, secret=True)))
            _referred.update({form: _given[form] for form in forms[:1]})


def as_references(node: object, *, back: bool = False) -> object:
    """Replace credentials from variables X by `${oc.env:X}` in nested dicts, lists and texts; or the reverse.

    For a state that is loaded again and needs the values.
    """
    found = _of_environment() | _referred
    pairs = [(instead, value) if back else (value, instead) for value, instead in found.items()]
    pairs.sort(key=lambda pair: -len(pair[0]))
    return _replaced(node, pairs) if pairs else node


def looks_random(value: str) -> bool:
    """Return whether a text could be a random key: letters and digits mixed unlike in words, paths and numbers."""
    if not re.fullmatch(r"[A-Za-z0-9+/_=~.\-]{16,}", value) or not (digits := re.findall(r"\d", value)):
        return False
    if value.count("/") == 1 and 2 * sum(map(len, _WORD.findall(value))) > len(value):  # meta-llama/Llama-2-7b-hf
        return False
    counts = Counter(value)
    entropy = -sum(n / len(value) * math.log2(n / len(value)) for n in counts.values())
    if re.fullmatch(r"[0-9a-fA-F]+", value):
        return len(value) >= 20 and entropy > 3
    mixed = re.search(r"[a-z]", value) and re.search(r"[A-Z]", value)
    parts = len(re.findall(r"[A-Za-z]+|\d+", value))
    return entropy > 3.4 and len(digits) > 1 and (bool(mixed) or len(value) >= 24) and parts > len(value) / 6


class CleanStream:
    """A text stream that removes credentials: Hydra prints overrides, and exceptions contain server requests."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(self.clean(text))
        return len(text)

    def clean(self, text: str) -> str:
        """Return a text without credentials."""
        return without_secrets(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


# -------------------------------------------------------------------------------------------------------------- texts


def _words(key: str) -> str:
    """Split a name into lower-case words."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", key)
    return re.sub(r"[\W_]+", " ", parted).strip().lower()


def _is_secret_number(key: str, value: object) -> bool:
    """Return whether a value is a numeric credential, such as a password of digits; `tokens` is a count."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return is_whole and len(str(value)) >= 6 and names_a_secret(key) and not _words(key).endswith("tokens")


def _is_place(key: str, value: object) -> bool:
    """Return whether a value is the path of credentials: GOOGLE_APPLICATION_CREDENTIALS."""
    return (
        isinstance(value, str)
        and (value.startswith(("/", "./", "../", "~/")) or value.endswith((".json", ".pem")))
        and _words(key).endswith(("credentials", "creds", "json", "pem"))
    )


def _of_command(words: Sequence[object]) -> Sequence[object]:
    """Remove the password from a command's words; return the same object if it has none."""
    if not all(isinstance(word, str) for word in words):
        return words
    line = "\n".join(f"\x1f{word}\x1f" for word in words)
    if (found := _COMMAND.sub(rf"\g<sign>{NOT_RECORDED}", line)) == line:
        return words
    return found[1:-1].split("\x1f\n\x1f")


def _names_option(item: object) -> bool:
    """Return whether the next item of a list is a credential for this option: ["--token", "..."]."""
    return isinstance(item, str) and re.fullmatch(r"--?[\w\-]+", item) is not None and names_a_secret(item)


def _without(text: str, values: list[tuple[str, str]], *, secret: bool) -> str:
    references = REFERENCE.findall(text)
    if secret and not _is_plain(text):
        return _with_references_alone(text, references)
    for number, reference in enumerate(references):  # set aside: they contain no values
        text = text.replace(reference, f"\0{number}\0", 1)
    changed = SECRET_VALUE.sub(_by_form, text)
    changed = _by_names(changed)
    changed = _SCHEME.sub(_scheme, changed)
    for number, reference in enumerate(references):
        changed = changed.replace(f"\0{number}\0", _default_hidden(reference, secret=False), 1)
    return _with_instead(changed, values)


def _with_instead(text: str, values: list[tuple[str, str]]) -> str:
    for value, instead in values:
        if value in text:
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])", instead.replace("\\", "\\\\"), text)
    return text


def _replaced(node: object, pairs: list[tuple[str, str]]) -> object:
    if isinstance(node, str):
        return _with_instead(node, pairs)
    if isinstance(node, dict):
        done = copy.copy(node)  # keeps the type, such as Counter
        done.clear()
        done.update({_replaced(key, pairs): _replaced(value, pairs) for key, value in node.items()})
        return done
    if isinstance(node, list | tuple) and type(node) in (list, tuple):
        return type(node)(_replaced(item, pairs) for item in node)
    return node


def _by_form(match: re.Match[str]) -> str:
    """Remove text with a credential's form, except placeholders for a URL's user and password."""
    if match.string.endswith("://", 0, match.start()):
        login = PLACEHOLDER.sub("", match[0])
        return match[0] if login != match[0] and not login.rpartition(":")[2] else NOT_RECORDED
    return NOT_RECORDED


def _by_names(text: str) -> str:
    """Remove values of names that name a credential."""
    if text.startswith("diff --git "):
        return "".join(_in_file(part) for part in re.split(r"(?m)^(?=diff --git )", text))
    if "=" not in text and ":" not in text and "-" not in text:
        return text
    begin = 0
    for name in typed[0].split("=")[:-1] if (typed := _TYPED.match(text)) else ():
        begin += len(name) + 1
        value = text[begin:]  # a typed value may have spaces
        weak = WEAK_KEY.search(_words(name)) is not None and looks_random(value)
        if weak or (names_a_secret(name) and not _is_plain(value, name) and not _is_place(name, value)):
            return f"{text[:begin]}{NOT_RECORDED}"
    text = _given_to_names(_HEADER.sub(_given_away, text))
    text = _COMMAND.sub(rf"\g<sign>{NOT_RECORDED}", text)
    for pattern in (_OPTION, _LISTED):
        text = pattern.sub(_given_away, text)
    text = _QUERY.sub(_in_query, text)
    text = _LOGIN.sub(lambda match: match["sign"] + NOT_RECORDED, text)
    if "{" in text or '"' in text or "\n" in text:
        text = _MAPPED.sub(_given_away, text)
    return _CODE.sub(_in_code, text)


def _given_to_names(text: str) -> str:
    """Remove values of credential names, also nested in another value: a=b=password=..."""
    for before, value in ((_BEFORE_VALUE, _VALUE), (_BEFORE_GROUP, _WHOLE_GROUP)):
        parts, end = [], 0
        for found in before.finditer(text):
            name = found["name"]
            if found.start() < end or not names_a_secret(name) or (given := value.match(text, found.end())) is None:
                continue
            quote = given.groupdict().get("quote") or ""
            whole = given["quoted"] if quote else given[0]
            if not _is_plain(whole, name) and not _is_place(name, whole) and not _holds_plain_words(whole):
                parts += [text[end : found.end()], quote, NOT_RECORDED, quote]
                end = given.end()
        text = "".join([*parts, text[end:]])
    return text


def _holds_plain_words(group: str) -> bool:
    """Return whether a text is a one-line list or mapping of only numbers, references and plain words."""
    items = [item.rpartition(":") for item in re.split(r"[\[\]{},]", group)]
    return group.startswith(("[", "{")) and all(
        _is_plain(value) or re.fullmatch(r"\s*[\d.+\-]+\s*", value) or "_target_" in key for key, _, value in items
    )


def _in_file(part: str) -> str:
    """Remove credentials from a patch to one file. In code, only from literals, so that it stays valid code."""
    part = _CODE.sub(_in_code, part)
    if part.partition("\n")[0].endswith((".py", ".pyi", ".pyx", ".ipynb")):
        return part
    part = _MAPPED.sub(_given_away, _given_to_names(_HEADER.sub(_given_away, part)))
    return _QUERY.sub(_in_query, part)


def _given_away(match: re.Match[str]) -> str:
    groups = match.groupdict()
    value = groups.get("quoted") or groups.get("bare") or ""
    if not names_a_secret(groups["name"]) or _is_plain(value) or _is_place(groups["name"], value):
        return match[0]
    quote = groups.get("quote") or ""
    return f"{groups['name']}{groups['sign']}{quote}{NOT_RECORDED}{quote}"


def _in_query(match: re.Match[str]) -> str:
    name, value = match["name"], match["bare"]
    words = _words(name)
    if not names_a_secret(name) and not _QUERY_KEY.search(words):
        return match[0]
    if words in ("s", "t", "code", "state", "hash", "policy", "session") and not looks_random(value):
        return match[0]
    return match[0] if _is_plain(value) else f"{name}={NOT_RECORDED}"


def _in_code(match: re.Match[str]) -> str:
    """Remove a literal assigned to a credential name; leave the rest of a patch unchanged."""
    value = match["quoted"]
    varied = re.search(r"\d", value) or (re.search(r"[a-z]", value) and re.search(r"[A-Z]", value)) or "-" in value
    is_one = len(value) >= 6 and varied and not re.search(r"[\s{}/\\%]", value) and not _is_plain(value)
    if not is_one or not names_a_secret(match["name"]):
        return match[0]
    return f"{match['name']}{match['sign']}{match['quote']}{NOT_RECORDED}{match['quote']}"


def _scheme(match: re.Match[str]) -> str:
    kind, value = match[1].lower(), match[3]
    if kind == "basic":
        try:
            is_one = b":" in base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            is_one = False
    else:
        is_one = looks_random(value) or (kind == "bearer" and len(value) >= 12 and re.search(r"\d", value) is not None)
    return f"{match[1]}{match[2]}{NOT_RECORDED}" if is_one else match[0]


def _is_plain(value: str, name: str = "") -> bool:
    """Return whether a text is not a credential, whatever its key: a marker, a plain word, an already removed one."""
    if value.startswith("[") and not value.strip("[]\x000123456789., "):  # numbers, references
        return True
    if name.endswith("s") and value.startswith("["):  # an override of a list
        return False
    value = value.strip("\"' ")
    return (
        not value
        or PLAIN_WORDS.fullmatch(value) is not None
        or value == "???"
        or MARKER.fullmatch(value) is not None
        or value.startswith((NOT_RECORDED, "(not", "\0"))
        or (value.startswith("-----BEGIN ") and "PRIVATE" not in value)  # a certificate
        or re.fullmatch(r"\$\{?[A-Z_][A-Z0-9_]*\}?", value) is not None  # a shell's variable
    )


def _with_references_alone(text: str, references: list[str]) -> str:
    """Return the replacement of a credential; if it has references to the environment, keep those."""
    if not references:
        return NOT_RECORDED
    rest = REFERENCE.sub("\0", text)
    parts = [part if len(part) < 3 or re.fullmatch(r"(?i)\s*(bearer|basic|token|apikey)\s+", part) else NOT_RECORDED
             for part in rest.split("\0")]  # fmt: skip
    found = iter(_default_hidden(reference, secret=True) for reference in references)
    return parts[0] + "".join(next(found) + part for part in parts[1:])


def _default_hidden(reference: str, *, secret: bool) -> str:
    """Return `${oc.env:X,default}` without a credential as the default."""
    name, comma, default = reference.partition(",")
    if not comma:
        return reference
    variable = name.rpartition(":")[2]
    is_secret = secret or names_a_secret(variable)
    inner = default.removesuffix("}").strip()
    if "${" in inner:
        return reference
    return f"{name},{_without(inner, list(_values()), secret=is_secret)}}}"


# ------------------------------------------------------------------------------------------------------------- values


def _values() -> Iterator[tuple[str, str]]:
    """Yield the credentials that this process knows, with their replacements; longest first."""
    found = dict(_given)
    for value, instead in _of_environment().items():
        found |= dict.fromkeys(_forms(value), instead)
    yield from sorted(found.items(), key=lambda item: -len(item[0]))


def _of_environment() -> dict[str, str]:
    """Return the values of variables that name a credential, with their replacements."""
    named = {name: value for name, value in os.environ.items() if name != "PWD" and names_a_secret(name)}
    return {
        form: f"${{oc.env:{name}}}"
        for name, value in named.items()
        if not value.startswith("/")
        for form in list(_forms(value))[:1]
    }


def _forms(value: str) -> Iterator[str]:
    """Yield a credential's forms in text; nothing if it could be an ordinary word or number."""
    value = value.strip()
    if (
        len(value) < 6
        or (value.isalpha() and value.islower() and len(value) < 16)
        or (value.isdigit() and len(value) < 9)
    ):
        return
    yield value
    if (quoted := urllib.parse.quote(value, safe="")) != value:
        yield quoted
    if "\n" in value:
        yield value.replace("\n", "\\n")
    yield base64.b64encode(value.encode("utf-8", "surrogateescape")).decode().rstrip("=")


def _hidden_in(before: object, after: object) -> Iterator[str]:
    """Yield the removed texts, or the removed parts of texts."""
    if before is after:
        return
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for value, other in zip(before.values(), after.values(), strict=False):
            yield from _hidden_in(value, other)
    elif isinstance(before, list | tuple) and isinstance(after, list | tuple):
        for value, other in zip(before, after, strict=False):
            yield from _hidden_in(value, other)
    elif isinstance(before, int | float):
        yield str(before)
    elif isinstance(before, str) and isinstance(after, str):
        pattern = "(.+?)".join(re.escape(part) for part in after.split(NOT_RECORDED))
        if match := re.fullmatch(pattern, before, re.DOTALL):
            yield from match.groups()
