//! A loaded program's instructions, as the verifier has left them. bpftool, which shows them too, takes
//! seconds for each program where there is no hardware to help a virtual machine.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use crate::kernel::sys::{CLASSIFIER, Instruction, get, instructions, load};
use crate::kernel::verdicts;

/// Loads a program that calls others by a table, and lets packets pass if there is none. Whether it counts as one that lets all packets pass.
///
/// # Errors
/// If the kernel does not take it, or does not show it.
pub fn lets_pass_with_a_tail_call(table: &Path) -> io::Result<bool> {
    const fn instruction(code: u8, registers: u8, immediate: i32) -> Instruction {
        Instruction { code, registers, offset: 0, immediate }
    }
    let table = get(table)?;
    let program = [
        instruction(0x18, 0x12, table.as_raw_fd()),
        instruction(0, 0, 0),
        instruction(0xb7, 0x03, 0),
        instruction(0x85, 0, 12),
        instruction(0xb7, 0, -1),
        instruction(0x95, 0, 0),
    ];
    Ok(verdicts::lets_pass(&instructions(load(CLASSIFIER, &program)?)?))
}

/// How many bytes of the stack a loaded program uses: as far down as its instructions reach from the frame
/// pointer.
///
/// # Errors
/// If the kernel does not show them.
///
/// # Panics
/// If it calls a function of its own, which has a frame of its own.
pub fn stack_of(program: &impl AsFd) -> io::Result<u32> {
    const FRAME: u8 = 10;
    const CALL: u8 = 0x85;
    const MOVE: u8 = 0xbf;
    const ADD: u8 = 0x07;
    let mut deepest = 0;
    let mut copy = None;
    for instruction in instructions(program)? {
        let Instruction { code: opcode, offset, immediate, .. } = instruction;
        let (to, from) = (instruction.destination(), instruction.source());
        assert!(opcode != CALL || from != 1, "a function of its own");
        let reaches = match opcode & 7 {
            1 if from == FRAME => -i32::from(offset),
            2 | 3 if to == FRAME => -i32::from(offset),
            _ if opcode == ADD && copy == Some(to) => -immediate,
            _ => 0,
        };
        deepest = deepest.max(reaches);
        copy = (opcode == MOVE && from == FRAME).then_some(to);
    }
    Ok(deepest.unsigned_abs())
}
