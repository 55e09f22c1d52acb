//! What a program of another's may say of a packet, read from its instructions.

use super::sys::Instruction;

/// The verdicts that hide no packet from the programs behind: the next one's turn, and dropped.
const PASSING: [i32; 2] = [-1, 2];

/// A set of registers, each of which may hold something else than a passing verdict.
type Doubtful = u16;

const VERDICT: Doubtful = 1;
/// What a call leaves behind: its result, and arguments that are gone.
const CALLED: Doubtful = 0b11_1111;
const ALL: Doubtful = Doubtful::MAX;

// The codes of RFC 9669, sections 4 and 5.
const LOAD_LONG: u8 = 0x18;
const MOVE_NUMBER: [u8; 2] = [0xb4, 0xb7];
const MOVE: [u8; 2] = [0xbc, 0xbf];
const GO: u8 = 0x05;
const GO_FAR: u8 = 0x06;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
/// A load by the packet's offset, of old.
const OLD_LOAD: u8 = 0;
/// A store of a register, or an exchange.
const STORE: u8 = 3;
/// A tail call, after which whoever is called has the last word: as the verifier has it. The kernel shows it as it was, a call of this
/// helper.
const TAIL_CALL: u8 = 0xf5;
/// See [`TAIL_CALL`].
const TAIL_CALL_HELPER: i32 = 12;
/// Calls and jumps to where a register says.
const BY_REGISTER: [u8; 3] = [0x8d, 0x0d, 0x0e];
/// What a call reads from if it is of a function of the kernel's own, one of which throws: then that is the verdict.
const OF_KERNEL: u8 = 2;

/// Where a program goes on after an instruction.
enum Next {
    /// At these distances.
    At([Option<isize>; 2]),
    /// It ends, and what it says is in the first register.
    Verdict,
}

/// Whether every packet that a tc program does not drop goes on to the next program of the chain. False is said of a program too
/// that can't be followed: it computes its verdict, or has others called.
pub fn lets_pass(program: &[Instruction]) -> bool {
    if program.iter().any(|instruction| may_leave(*instruction)) {
        return false;
    }
    let mut seen: Vec<Option<Doubtful>> = vec![None; program.len()];
    let mut open = vec![(0, ALL)];
    while let Some((index, doubtful)) = open.pop() {
        let Some(&instruction) = program.get(index) else { return false };
        let known = seen[index];
        let joined = known.unwrap_or_default() | doubtful;
        if known == Some(joined) {
            continue;
        }
        seen[index] = Some(joined);
        match next(instruction) {
            Next::Verdict if joined & VERDICT != 0 => return false,
            Next::Verdict => {}
            Next::At(distances) => {
                let after = step(instruction, joined);
                for distance in distances.into_iter().flatten() {
                    let Some(to) = index.checked_add_signed(distance) else { return false };
                    open.push((to, after));
                }
            }
        }
    }
    !program.is_empty()
}

fn next(instruction: Instruction) -> Next {
    let near = 1 + isize::from(instruction.offset);
    match instruction.code {
        EXIT => Next::Verdict,
        LOAD_LONG => Next::At([Some(2), None]),
        GO => Next::At([Some(near), None]),
        GO_FAR => Next::At([isize::try_from(instruction.immediate).ok().map(|far| far + 1), None]),
        code if is_branch(code) => Next::At([Some(1), Some(near)]),
        _ => Next::At([Some(1), None]),
    }
}

/// Whether an instruction, of the program or of a function of its own, may end the program without its own word.
fn may_leave(instruction: Instruction) -> bool {
    let Instruction { code, immediate, .. } = instruction;
    let calls = |who| code == CALL && instruction.source() == who;
    code == TAIL_CALL
        || BY_REGISTER.contains(&code)
        || calls(OF_KERNEL)
        || calls(0) && immediate == TAIL_CALL_HELPER
}

/// Whether it goes on at one of two places: the two classes of jumps, but for calls.
const fn is_branch(code: u8) -> bool {
    matches!(code & 7, 5 | 6) && code != CALL
}

/// Which registers are doubtful after an instruction.
fn step(instruction: Instruction, doubtful: Doubtful) -> Doubtful {
    let to = 1 << instruction.destination();
    let with = |is_doubtful| if is_doubtful { doubtful | to } else { doubtful & !to };
    match instruction.code {
        CALL => doubtful | CALLED,
        code if MOVE_NUMBER.contains(&code) => with(!PASSING.contains(&instruction.immediate)),
        // With an offset it copies a part of the register.
        code if MOVE.contains(&code) && instruction.offset == 0 => {
            with(doubtful & (1 << instruction.source()) != 0)
        }
        code if is_branch(code) || code == GO || code == GO_FAR => doubtful,
        // An exchange in memory gives back what was there, in the first register or in one that it names.
        code if code & 7 == STORE => doubtful | VERDICT | to | 1 << instruction.source(),
        _ if instruction.code & 7 == OLD_LOAD => doubtful | CALLED | to,
        _ => doubtful | to,
    }
}

#[cfg(test)]
mod tests {
    use super::super::sys::Instruction;
    use super::{
        BY_REGISTER, CALL, EXIT, GO, LOAD_LONG, MOVE, MOVE_NUMBER, TAIL_CALL, TAIL_CALL_HELPER,
        lets_pass,
    };

    const JUMP_IF_EQUAL: u8 = 0x15;
    const ADD: u8 = 0x07;
    const EXCHANGE: u8 = 0xdb;

    const fn instruction(code: u8, registers: u8, offset: i16, immediate: i32) -> Instruction {
        Instruction { code, registers, offset, immediate }
    }

    const fn number(register: u8, number: i32) -> Instruction {
        instruction(MOVE_NUMBER[1], register, 0, number)
    }

    const END: Instruction = instruction(EXIT, 0, 0, 0);

    #[test]
    fn a_program_that_says_next_or_drop_hides_nothing() {
        assert!(lets_pass(&[number(0, -1), END]));
        assert!(lets_pass(&[number(0, 2), END]));
        // By another register, which a call leaves alone.
        let copy = instruction(MOVE[1], 0x60, 0, 0);
        assert!(lets_pass(&[number(6, -1), instruction(CALL, 0, 0, 5), copy, END]));
        // Either of both.
        let jump = instruction(JUMP_IF_EQUAL, 1, 1, 0);
        assert!(lets_pass(&[number(0, 2), jump, number(0, -1), END]));
    }

    #[test]
    fn a_program_that_may_end_the_chain_is_known() {
        for verdict in [0, 1, 3, 7] {
            assert!(!lets_pass(&[number(0, verdict), END]), "{verdict}");
        }
        let jump = instruction(JUMP_IF_EQUAL, 1, 1, 0);
        assert!(!lets_pass(&[number(0, 0), jump, number(0, -1), END]), "in one case of two");
        // In a circle, by a register that is changed late in it.
        let back = instruction(JUMP_IF_EQUAL, 1, -3, 0);
        let copy = instruction(MOVE[1], 0x60, 0, 0);
        assert!(!lets_pass(&[number(6, -1), copy, number(6, 0), back, END]));
    }

    #[test]
    fn what_cannot_be_followed_may_end_the_chain() {
        let of = |code, registers| instruction(code, registers, 0, 0);
        assert!(!lets_pass(&[]), "nothing");
        assert!(!lets_pass(&[of(0, 0); 4]), "not shown");
        assert!(!lets_pass(&[number(0, -1)]), "no end");
        assert!(!lets_pass(&[number(0, -1), of(CALL, 0), END]), "the result of a call");
        assert!(!lets_pass(&[number(0, -1), of(ADD, 0), END]), "computed");
        assert!(!lets_pass(&[number(0, -1), of(EXCHANGE, 0x01), END]), "exchanged");
        assert!(!lets_pass(&[number(0, -1), of(TAIL_CALL, 0), END]), "another program");
        let call = instruction(CALL, 0, 0, TAIL_CALL_HELPER);
        assert!(!lets_pass(&[call, number(0, -1), END]), "another program, as it is shown");
        let in_function = [number(0, -1), END, of(TAIL_CALL, 0), number(0, -1), END];
        assert!(!lets_pass(&in_function), "another program, by a function");
        assert!(!lets_pass(&[of(CALL, 0x20), number(0, -1), END]), "the kernel's own may throw");
        assert!(!lets_pass(&[number(0, -1), of(BY_REGISTER[0], 0), END]), "whoever is called");
        let goes = instruction(BY_REGISTER[1], 0x06, 0, 0);
        assert!(!lets_pass(&[number(0, -1), goes, END]), "wherever it goes");
        assert!(!lets_pass(&[number(0, -1), of(EXCHANGE, 0x10), END]), "loaded");
        assert!(!lets_pass(&[number(0, -1), of(LOAD_LONG, 0), of(0, 0), END]), "a long number");
        assert!(!lets_pass(&[number(0, -1), instruction(GO, 0, -9, 0), END]), "out of it");
    }
}
