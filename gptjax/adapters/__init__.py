"""Parameter-efficient fine-tuning: a few parameters beside a frozen decoder, `params["adapters"]`, and how the two go together.

attach.py makes them, compose.py puts them into the decoder's parameters for a computation, merge.py for good; nodes.py has what
then stands in a kernel's place; peft.py reads and writes PEFT's files. What is trained, `config.adapter` says.
"""
