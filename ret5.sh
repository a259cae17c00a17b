. /work/q/ret2.sh
MODEL=$R/once.gguf
one once8 2048 paged,256,policy=probe
one once4 1024 paged,256,policy=probe
