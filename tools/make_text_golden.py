"""Writes the golden files of tests/text/main.rs and tests/text_chat.rs: what transformers, jinja2 and tokenizers make of the same input.

Run: python tools/make_text_golden.py [--check] (needs transformers 5, tokenizers 0.23, jinja2 >= 3.1.6)

Every template and every line of text in here was written for this file. The templates follow the
documented order of special tokens of the checkpoints that they stand for; no template is copied.
"""

import datetime
import json
import pathlib
import sys

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).resolve().parent.parent / "tests" / "text"
NOW = datetime.datetime(2026, 3, 7, 9, 5, 2, 123456)

# ------------------------------------------------------------------------------------ templates

TEMPLATES = {
    # Role with a capital, colon, space, trimmed text, end of turn; no BOS in the template.
    "bitnet-2b4t": (
        "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}",
        "<|begin_of_text|>", "<|eot_id|>"),
    "chatml": (
        """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
        None, "<|im_end|>"),
    "llama3-tools": (
        """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_text = messages[0]['content'] | trim %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system_text = '' %}
    {%- set rest = messages %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}
    {{- 'Environment: ipython\\n' }}
{%- endif %}
{{- 'Today Date: ' + date_string + '\\n\\n' }}
{%- if tools is not none %}
    {{- 'You may call these functions:\\n\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- '\\n\\n' }}
    {%- endfor %}
{%- endif %}
{{- system_text }}<|eot_id|>
{%- for message in rest %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception('Only one tool call at a time!') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ '}' -}}
        <|eot_id|>
    {%- elif message.role == 'tool' or message['role'] == 'ipython' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {%- if message.content is mapping or (message.content is iterable and message.content is not string) %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
        "<|begin_of_text|>", "<|eot_id|>"),
    "mistral-like": (
        """{%- if messages and messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Roles must alternate user/assistant/user/assistant/...; found " ~ message.role ~ " at " ~ loop.index) }}
    {%- endif %}
    {%- if message.role == "user" %}
        {%- if loop.last and system is defined %}
            {{- "[INST] " + system + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"].strip() + eos_token }}
    {%- endif %}
{%- endfor %}
""",
        "<s>", "</s>"),
    "gemma-like": (
        """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
    {% if message['role'] == 'assistant' %}
        {% set role = 'model' %}
    {% else %}
        {% set role = message['role'] %}
    {% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{ '<start_of_turn>model\\n' }}
{%- endif %}
""",
        "<bos>", "<eos>"),
    "falcon3-like": (
        """{% if tools %}{% for message in messages %}{% if message['role'] == 'system' %}<|system|>
{{ message['content'] }}
You can use these tools:
{{ tools | tojson }}
{% endif %}{% endfor %}{% endif %}{% for message in messages %}{% if message['role'] == 'system' and not tools %}{{ '<|system|>\\n' + message['content'] + '\\n' }}{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '\\n' }}{% elif message['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\\n' + message['content'] + eos_token + '\\n' }}{% else %}{{ '<|assistant|>\\n' + message['content'] + eos_token }}{% endif %}{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}""",
        None, "<|endoftext|>"),
    # Not a checkpoint: what templates do with values, macros, loops and whitespace.
    "features": (
        """{#- a comment with {% generation %} in it -#}
{%- macro turn(role, text, suffix='.') -%}
    [{{ role | upper }}|{{ text }}{{ suffix }}]
{%- endmacro -%}
{%- macro framed(role) -%}
    <{{ role }}>{{ caller(role ~ '!') }}</{{ role }}>
{%- endmacro -%}
{%- set ns = namespace(count=0, names=[], last=none) -%}
{% for message in messages %}
  {% if message.role == 'skip' %}{% continue %}{% endif %}
  {% if ns.count == 6 %}{% break %}{% endif %}
  {% set ns.count = ns.count + 1 %}
  {% set ns.names = ns.names + [message.role] %}
  {% set ns.last = message %}
  {% generation %}
{{ turn(message.role, message.content) }}
  {% endgeneration %}
  {%- generation -%}  tight  {%- endgeneration -%}
{% else %}
nothing
{% endfor %}
{{ ns.count }} {{ ns.names | join(', ') }} {{ ns.names }} {{ ns.last.role if ns.last else 'nobody' }}
{{ true }} {{ none }} {{ 1.0 }} {{ 1 / 4 }} {{ 7 // 2 }} {{ 2 ** 5 }} {{ 'ab' * 2 }} {{ -7 % 3 }}
{{ 'a,b,,c'.split(',') }} {{ 'a b  c'.split() }} {{ ' x '.strip() ~ '|' }} {{ 'xxaxx'.strip('x') }} {{ 'aXbX'.rsplit('X', 1) }}
{{ 'Hello'.startswith('He') }} {{ 'Hello'.endswith(('x', 'lo')) }} {{ 'hello world'.title() }} {{ 'hello'.capitalize() }}
{{ 'hello'[1:3] }} {{ 'hello'[::-1] }} {{ 'hello'[-1] }} {{ [1, 2, 3][::-1] | list }} {{ [1, 2, 3][1:] }}
{{ {'b': 1, 'a': [1.5, true, none, 'x']} }} {{ {'b': 1, 'a': 2}.items() | list }} {{ {'b': 1}.get('c', 'd') }}
{% for key, value in {'z': 1, 'y': 2}.items() %}{{ key }}={{ value }}{{ ',' if not loop.last }}{% endfor %}

{% for key in {'z': 1, 'y': 2} %}{{ loop.index }}{{ key }}{{ loop.previtem }}{% endfor %}

{% for a in [1, 2, 3] if a != 2 %}{{ loop.index0 }}:{{ a }}/{{ loop.length }}/{{ loop.revindex }} {% endfor %}

{{ undefined_name }}|{{ undefined_name is defined }}|{{ messages[0].absent is defined }}|{{ messages[0].absent }}|{{ messages[0].absent | default('none given') }}
{{ 'x' is string }} {{ 1 is string }} {{ messages is sequence }} {{ messages is iterable }} {{ 'x' is iterable }} {{ {} is mapping }} {{ 1 is number }} {{ none is none }} {{ true is boolean }} {{ 'x' is sequence }} {{ {} is sequence }} {{ nope is sequence }} {{ nope is iterable }} {{ 1 is iterable }} {{ none is sequence }} {{ {} is iterable }} {{ true is number }} {{ true is integer }} {{ nope is mapping }} {{ nope is string }} {{ nope is none }}
{{ {'k': '<b> & "q" \\' é \\u2028 \\n\\t', 'n': [1, 1.0, 1e20, 1e-7, -0.5, 12345678901234567890], 'e': {}, 'l': []} | tojson }}
{{ {'b': [1, {'c': {}}], 'a': []} | tojson(indent=2) }}
{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true, ensure_ascii=true, separators=(',', ':')) }}
{{ [1, 2, 3] | tojson }} {{ 'é"' | tojson }} {{ none | tojson }} {{ true | tojson }} {{ (1, 2) | tojson }}
{{ messages | map(attribute='role') | join('/') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ messages | length }}
{{ messages | first | tojson }} {{ (messages | last).role }} {{ [3, 1, 2] | sort }} {{ [1, 2, 3] | sum }} {{ 'abc' | replace('b', 'X') }}
{{ 'line one\\nline two' | indent(4) }} {{ ' pad ' | trim }} {{ 'AbC' | lower }} {{ 'a' in 'abc' }} {{ 'x' not in ['y'] }} {{ 1 if false }}
{{ 'one' ~ 2 ~ none ~ 3.0 }} {{ '%s-%d' | format('a', 3) }} {{ 'a'.join(['1', '2']) }} {{ 'aXa'.replace('a', 'b') }} {{ 'aXa'.replace('a', 'b', 1) }} {{ 'banana'.count('an') }} {{ 'abc'.find('c') }}
{{ 'prefix-x'.removeprefix('prefix-') }} {{ 'x.txt'.removesuffix('.txt') }} {{ 'k=v=w'.partition('=') }} {{ 'k=v=w'.rpartition('=') }} {{ 'a\\nb\\n'.splitlines() }} {{ ' l'.lstrip() }}{{ 'r '.rstrip() }}
{% set block %}  kept {{ 1 + 1 }}  {% endset %}[{{ block }}]
{% set a, b = 1, 2 %}{{ a }}{{ b }} {% with c = a + b, d = 5 %}{{ c }}{{ d }}{% endwith %}
{%- call(x) framed('r') %} {{ x }} {% endcall %}
{% raw %}{{ not a variable }} {% generation %}{% endraw %}
{% filter upper %}shout{% endfilter %}
{% if messages | length > 1 and (messages[1].role == 'assistant' or not true) %}second is assistant{% elif false %}no{% else %}other{% endif %}
    {%+ if true %}kept indent{% endif %}
   {% if true %}
lost indent
   {% endif %}
{{ strftime_now('%Y-%m-%d %H:%M:%S.%f|%d %b %Y|%B %-d, %Y|%A|%j|%I %p|%%|%y|%Z|') }}
{{ range(3) | list }} {{ range(5, 1, -2) | list }} {{ dict(a=1) }} {{ [[1, 2], [3]] | map('first') | list }} {{ messages[-1].role }} {{ messages[1:3] | length }}
{{ 'a' < 'b' }} {{ [1, 2] == [1, 2] }} {{ not none }} {{ 0 or 'alt' }} {{ '' and 'x' }} {{ 5 | string ~ 'x' }} {{ '42' | int + 1 }} {{ 3.7 | int }} {{ 3.14159 | round(2) }} {{ -3 | abs }}
end
""",
        "<s>", "</s>"),
    "undefined-attribute": ("{{ messages[0].absent.deeper }}", None, None),
    "raises": ("{{ raise_exception('no, because ' ~ messages[0].role) }}", None, None),
    "bare-newlines": ("\n\nA\n{% if true %}\nB\n{% endif %}\n\nC\n\n", None, None),
}

# Templates that are no checkpoint's, and the conversations that they are rendered with.
SHORT = {"features": ("one", "system", "many"), "undefined-attribute": ("one",), "raises": ("one",), "bare-newlines": ("one",)}

TOOLS = [
    {"type": "function", "function": {
        "name": "weather", "description": "Weather at a place, in °C <now> & \"soon\"",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer", "default": 3}},
                       "required": ["place"]}}},
    {"type": "function", "function": {"name": "nothing", "parameters": {}}},
]

CONVERSATIONS = {
    "one": [{"role": "user", "content": "hi"}],
    "untrimmed": [{"role": "user", "content": "  \n hello  there\n\n "}, {"role": "assistant", "content": " yes \n"},
                  {"role": "user", "content": "\tok"}],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Grüße, 世界 🌍"},
               {"role": "assistant", "content": "<b>Hallo</b> & \"so\""}, {"role": "user", "content": "{{ 7 * 7 }} {% if %}"}],
    "wrong-order": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "assistant-last": [{"role": "user", "content": "Begin:"}, {"role": "assistant", "content": "Once"}],
    "tool-call": [{"role": "user", "content": "Weather in Zürich?"},
                  {"role": "assistant", "content": "", "tool_calls": [
                      {"type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich <ZH>", "days": 2, "x": 1.5, "y": None, "z": [True]}}}]},
                  {"role": "tool", "content": {"celsius": 21.0, "wind": "søndag"}},
                  {"role": "assistant", "content": "21 °C"}, {"role": "user", "content": "Thanks"}],
    "many": [{"role": "user" if i % 2 == 0 else "assistant", "content": f"line {i}"} for i in range(9)] + [{"role": "skip", "content": ""}],
    "specials": [{"role": "user", "content": "<|eot_id|> </s> [/INST] <end_of_turn>"}],
    "empty-content": [{"role": "user", "content": ""}],
}


class FixedClock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


def render_all():
    chat_template_utils.datetime = FixedClock
    cases = []
    for name, (template, bos, eos) in TEMPLATES.items():
        for conversation, messages in CONVERSATIONS.items():
            for generation in (False, True):
                for tools in (None, TOOLS):
                    if name in SHORT and (generation or conversation not in SHORT[name]):
                        continue
                    if tools and name not in ("llama3-tools", "falcon3-like"):
                        continue
                    tokens = {k: v for k, v in (("bos_token", bos), ("eos_token", eos)) if v is not None}
                    case = {"template": name, "conversation": conversation, "generation": generation, "tools": bool(tools)}
                    try:
                        [case["text"]], _ = chat_template_utils.render_jinja_template(
                            [messages], tools=tools, chat_template=template, add_generation_prompt=generation, **tokens)
                    except Exception as error:  # whatever it is, ours must refuse too
                        case["error"] = str(error)
                        case["raised"] = type(error).__name__ == "TemplateError"
                    cases.append(case)
    return {
        "now": NOW.isoformat(),
        "templates": {name: {"source": t, "bos_token": b, "eos_token": e} for name, (t, b, e) in TEMPLATES.items()},
        "tools": TOOLS, "conversations": CONVERSATIONS, "cases": cases,
    }


# ----------------------------------------------------------------------------------- tokenizers

# The split of Llama 3 (and so of BitNet 2B4T), as its tokenizer.json has it.
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")

SENTENCES = """The little engine weighs every number it meets and keeps only its sign.
Three values are enough: minus one, zero and plus one.
We're told that it's fast; they'll see, I'd say, and you've measured it, haven't you?
IT'S LOUD HERE, DON'T YOU THINK? We'Re mixing cases.
Prices rose from 3 to 1234567 in 2024, or by 12.5 %, or 1,000,000.00 units.
def add(a, b):\n    return a + b  # a comment\n\n\nprint(add(1, 22))
{"key": [1, 2.5, null], "other": {"nested": "value"}}
https://example.org/a/b?c=d&e=f#g and mail@example.org
El niño comió una piña en la cigüeña; ¿verdad que sí? ¡Claro!
Où est passée l'œuvre de Noël ? À bientôt, garçon naïf.
Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.
Příliš žluťoučký kůň úpěl ďábelské ódy.
Zażółć gęślą jaźń, a potem źle śpij.
Съешь же ещё этих мягких французских булок, да выпей чаю.
Ο καφές είναι ζεστός και η θάλασσα ήρεμη.
שלום לכולם, מה שלומכם היום?
مرحبا بالعالم، كيف حالكم اليوم؟
नमस्ते दुनिया, आज मौसम अच्छा है।
বাংলা ভাষায় লেখা একটি বাক্য।
வணக்கம் உலகம், எப்படி இருக்கிறீர்கள்?
สวัสดีชาวโลก วันนี้อากาศดีมาก
မင်္ဂလာပါ ကမ္ဘာလောက
ខ្ញុំចូលចិត្តសៀវភៅ
გამარჯობა მსოფლიო
Բարեւ աշխարհ
今天天气很好,我们去公园散步吧。
私は毎朝コーヒーを飲みながら新聞を読みます。カタカナ と ｶﾀｶﾅ
안녕하세요 세계, 오늘도 좋은 하루 되세요.
Tiếng Việt có nhiều dấu thanh, phải không?
Türkçe'de İ ve ı ayrı harflerdir.
አማርኛ በኢትዮጵያ ይነገራል
ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ
𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒎𝒂𝒕𝒉 𝟙𝟚𝟛 and 𐍈 𐎀 𒀀
👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇨🇭🇯🇵 ☕️ ❤️‍🔥 🤷🏿‍♀️ 1️⃣
e\u0301 versus é; A\u030a versus Å; ﬁ ﬂ ﬀ; ½ ⅓ ² ³ ₁; Ⅷ ① ㍿ №
a\u0300\u0301\u0302\u0303 stacked; q\u0323\u0307 and Z\u0351\u0348
zero\u200bwidth\u200cjoin\u200der \ufeffbom soft\u00adhyphen
no\u00a0break thin\u2009space ideographic\u3000space ogham\u1680space line\u2028sep para\u2029sep
control \u0001\u0007\u001b\u007f\u0080\u009f characters and nul \u0000 here
replacement \ufffd private \ue000 \U000f0000 noncharacter \ufdd0 \uffff \U0010ffff
arrows → ← ⇒ ∀x∈ℝ: ∑ᵢ xᵢ² ≥ 0 ∧ ∂f/∂x ≠ ∞ ± √2 × ÷
quotes “double” ‘single’ „low“ «guillemets» 「かぎ」 – — … • § ¶ † ‡
""".replace("\\n", "\n")


def lines():
    base = [line for line in SENTENCES.split("\n") if line]
    out = ["", " ", "  ", "   ", "\n", "\n\n", " \n", "\n ", "\t", "\t\t x", "\r\n", "\r", " \r\n \r\n", "a\r\nb", "\x0b\x0c\x85",
           " a", "  a", "   a", "a ", "a  ", "a   ", "a b", "a  b", "a   b", "a    b\n", "a\n\n\nb", "a \n b", "\n\n  a", "x\t\ty",
           "'s", "'S", "'sx", "it's", "IT'S", "''s", "'ll'll", "don't'", "'ſ", "'K", "'ı",
           "1", "12", "123", "1234", "12345678", "1a2b", "٣٤٥٦", "१२३४", "²³", "Ⅷ", "1.2.3", "１２３４",
           "<s>", "</s>", "<unk>", "<|begin_of_text|>", "<|eot_id|>", "a<|eot_id|>b", "<|eot_id|><|eot_id|>", " <|eot_id|> ", "<|eot_id", "eot_id|>",
           "<s>a", "a</s>", " </s> b", "<0x41>", "<0x0A>", "<0xE5>", "▁", "▁a", "a▁b", "▁▁", "Ġ", "Ġa Ċ",
           "<|begin_of_text|>User: hi<|eot_id|>Assistant: ", "ﷺ", "İ", "ß", "ẞ", "ŉ", "ǰ", "\u0345", "\u1e9b\u0323", "가각", "\u1100\u1161",
           "!?!?!?", "...", "---\n\n", "!!!\r\n\r\nx", "a!b", "#!/bin/sh", "$100", "C++", "x_y", "@@", "=>", "==", "  ==", "\n==\n",
           "a" * 40, "ab" * 30, " " * 37 + "x", "\n" * 21, "=" * 33, "😀" * 9, "é" * 17, "的" * 11]
    out += base
    out += [" " + line for line in base]
    out += [line.upper() for line in base[:30]]
    out += [line[::-1] for line in base]
    out += [a[: len(a) // 2] + b[len(b) // 2 :] for a, b in zip(base, base[7:])]
    out += [line.replace(" ", "  ") + "\n" for line in base[:20]]
    return out


def train(name, text):
    if name == "byte_level":
        tokenizer = Tokenizer(models.BPE(ignore_merges=True))
        from tokenizers import Regex
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=640, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
        tokenizer.train_from_iterator(text, trainer)
        names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in names])
        bos = "<|begin_of_text|>"
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))])])
    elif name == "byte_fallback":
        byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer = trainers.BpeTrainer(vocab_size=620, special_tokens=["<unk>", "<s>", "</s>"] + byte_tokens, limit_alphabet=120, show_progress=False)
        tokenizer.train_from_iterator([w for line in text for w in line.split()], trainer)
        # In published files the byte tokens are plain vocabulary, not added tokens.
        data = json.loads(tokenizer.to_str())
        data["added_tokens"] = [t for t in data["added_tokens"] if not t["content"].startswith("<0x")]
        tokenizer = Tokenizer.from_str(json.dumps(data))
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False)
        tokenizer.train_from_iterator(text, trainer)
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B:1 </s>:1", special_tokens=[("</s>", 2)])
    return tokenizer


def tokenizers_golden():
    text = [line for line in SENTENCES.split("\n") if line]
    cases = lines()
    golden = {"lines": cases, "tokenizers": {}}
    for name in ("byte_level", "byte_fallback", "unigram"):
        path = HERE / f"{name}.json"
        if not path.exists():  # training breaks ties by hash order: train once, keep the file
            data = json.loads(train(name, text * 3).to_str())
            path.write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
        tokenizer = Tokenizer.from_file(str(path))
        plain = Tokenizer.from_file(str(path))
        plain.encode_special_tokens = True
        rows = []
        for line in cases:
            ids = tokenizer.encode(line, add_special_tokens=False).ids
            row = {"ids": ids, "text": tokenizer.decode(ids, skip_special_tokens=False), "skipped": tokenizer.decode(ids, skip_special_tokens=True)}
            other = plain.encode(line, add_special_tokens=False).ids
            if other != ids:
                row["plain"] = other
            if row["text"] == line:
                row["text"] = None
            if row["skipped"] == line:
                row["skipped"] = None
            rows.append(row)
        golden["tokenizers"][name] = {"size": tokenizer.get_vocab_size(), "with_special": tokenizer.encode("a b").ids, "rows": rows}
    return golden


def write(name, value):
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":")) + "\n"
    path = HERE / name
    if "--check" in sys.argv:
        if path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path} differs from what the installed libraries make")
    else:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    HERE.mkdir(parents=True, exist_ok=True)
    write("chat_golden.json", render_all())
    write("tokenizer_golden.json", tokenizers_golden())
