"""Compile Triton kernels ahead of time, so that the first training step does not wait for the compiler.

    from fat.kernels.prefill.compile_ahead import compile_ahead
    from fat.kernels.prefill.work import evaluation, training_step

    report = compile_ahead([training_step(model, (256, 3, 224, 224)), evaluation(model, (256, 3, 224, 224))])

`work` runs a model on tensors without memory, `launches` records the kernels that it would launch, and `compile_ahead`
compiles those that are missing in Triton's cache, in processes that `compiler` starts. `python -m fat.kernels.prefill`
does the same from the command line, also on machines without a GPU. All modules except `work` require Triton.
"""
