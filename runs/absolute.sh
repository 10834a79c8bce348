# absolute NAME|PATH|ADDRESS: a value for --data, with a path relative to the caller made absolute; sourced by recipes

absolute() {
    case "$1" in
        "~/"*) printf '%s\n' "$HOME/${1#"~/"}"; return ;;
        file://*) printf '%s\n' "${1#file://}"; return ;;
        builtin | climbmix | fineweb-edu | /*) ;;
        *) if [ -e "$1" ] || compgen -G "$1" >/dev/null; then printf '%s\n' "$PWD/$1"; return; fi ;;
    esac
    printf '%s\n' "$1"
}
