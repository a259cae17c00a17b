"""The retrieval model, a small Llama that judges compressed KV caches: scripts/train_retrieval_model.py.

Its words (``vocabulary``), the texts it learns from (``texts``), the network (``model``), its optimiser
(``muon``), the run (``training``) and the file (``export``). docs/retrieval.md says what it is for. All but
``vocabulary`` and ``texts`` need torch.
"""
