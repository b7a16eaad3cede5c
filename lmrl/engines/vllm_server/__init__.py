"""The engine that samples on vLLM servers, in processes of their own or on other machines."""
