// What words.js uses of jsdiff.
export function diffArrays<T>(older: T[], newer: T[]): { value: T[]; added: boolean; removed: boolean }[];
