"""`acpo inspect`: rollouts side by side, each step with the credit it was given. data.py reads them, text.py makes them from any traces and any
model, terminal.py and page.py show them."""
