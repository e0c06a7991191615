"""An Azure SignalR Service in serverless mode, for laptops and tests."""
