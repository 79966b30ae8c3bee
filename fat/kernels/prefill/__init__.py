"""Compile Triton kernels before they are launched, so that the first step does not wait for the compiler.

    from fat.kernels.prefill.compile_ahead import compile_ahead
    from fat.kernels.prefill.work import evaluation, training_step

    report = compile_ahead([training_step(model, (256, 3, 224, 224)), evaluation(model, (256, 3, 224, 224))])

`work` runs a model on tensors without memory, `launches` records the kernels that it would launch, `compile_ahead`
compiles those that Triton's cache lacks, in the processes that `compiler` starts. `python -m fat.kernels.prefill` does
the same from the command line, on machines without a GPU too. All but `work` need Triton.
"""
