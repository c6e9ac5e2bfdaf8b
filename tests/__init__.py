from tests.interpreter import interpret_triton

interpret_triton()
