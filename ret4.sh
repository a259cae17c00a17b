. /work/q/ret2.sh
one n48probe8 2048 paged,256,policy=probe
one n48probe4 1024 paged,256,policy=probe
