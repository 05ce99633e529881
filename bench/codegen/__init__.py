"""Tools of the kernels' author: what kernels compile to, and the errors of their arithmetic."""
