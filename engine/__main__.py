from step1x.engine.cli import main

if __name__ == "__main__":
    main()
