"""Measuring encoders: evaluators, protocols, the binder, results, tables.

An evaluator (`registry.EVALUATORS`) is a generator of named numbers from
features, views and labels; a protocol (`protocols.PROTOCOLS`) names an
evaluator and holds its hyper-parameters:

  protocol = protocols.PROTOCOLS["knn/imsvd"]
  inputs = Inputs(train=train, test=test)
  for name, value in registry.evaluate(protocol, inputs):
    ...

`binder` turns a run into the inputs of an evaluator; `online` and `offline`
are its two callers. A new evaluator is one file and one line of the registry.
"""
