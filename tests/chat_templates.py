"""Chat templates: one that marks the answers itself, and the same without marks."""

HEAD = "{% for m in messages %}[{{ m.role }}]\n"
MARKED = (
    HEAD + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}{{ m.content }}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
